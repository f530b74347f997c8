"""One HTML page about a store or a slide: its problems, and planes of its images as pictures.

In reading order::

    problems         warnings, mismatches and damage, from the manifest and the lengths of files
    planes           which planes of an image, in which orientation, read in little memory
    labels           names, voxel counts and colours of labels
    pictures         planes in grey with outlines of labels over them, as PNG
    subject_section  one subject: pictures, histograms, problems
    texts            values as text
    summary          a cohort in sums
    page             the templates, filled, and their content security policy
    report           write_report: a store -> the page
    slide_report     write_slide_report: a slide -> a page with a thumbnail and its tissue
"""
