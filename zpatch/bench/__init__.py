"""How fast a store is read, and what would be faster.

In reading order::

    patch_group       patches that are read together
    packing           other chunks and codecs, and the bytes that patches then decode
    trial_stores      small stand-ins for a store in another packing
    reading_speed     patches per second of several processes, cold and warm
    benchmark_plan    patches, processes, time and memory
    benchmark_report  the figures
    benchmark         the run of a plan
    slide_reading     the same of a slide: patches per second
    queue_trial       a queue over the store, with its transform, before training begins
    advice            what to change, by the figures
"""
