"""Repeats the inexpensive checks of the exporters on finished artifacts, which may have been modified since.

Hashes show that the files match the manifest. They show neither that the manifest's statements are true, nor that the
program that wrote the files was correct. Here the files are read as an engine reads them, the linters run on them, the
manifest's statements are compared with them, and, if the parent is available, every number and every file is compared
with the parent's.
"""
