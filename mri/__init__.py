"""Find the files of a data set, divide them into splits, and read their slices.

`files` and `subjects` interpret file names. `hipmri` and `splits` decide which file is in which
split. `nifti_file` reads files safely, `geometry` interprets their headers, and `nifti` cuts them
into planes and writes planes back. `preprocessing` crops or resizes slices to one size, `encoding`
rounds them to int16, and `cache` keeps them on disk. `messages` writes the errors and notes that
the user sees. `phantom` simulates the scans of the sample data.
"""
