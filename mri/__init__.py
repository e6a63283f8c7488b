"""Data: `hipmri` and `splits` decide which file is in which split, by the names (`files`) and the
`subjects` of files; `nifti` reads them, `preprocessing` makes slices of them, and `cache` keeps the
slices on disk. `phantom` simulates pelvic scans, the sample data."""
