"""The patch APIs of TorchIO and MONAI on zpatch: scripts that use them run after changing one import."""
