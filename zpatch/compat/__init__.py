"""The patch APIs of other libraries, on zpatch: scripts written for them run by changing one import."""
