"""Where slices come from: `splits` and `hipmri` decide which file is in which split, `files` and
`subjects` interpret names, `nifti` reads files, `preprocessing` makes slices of them, and `cache`
keeps decoded slices on disk. `phantom` simulates the scans of the sample data."""
