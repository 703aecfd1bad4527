"""Repeats the inexpensive checks of the exporters on finished artifacts, whoever has written to them since.

Hashes show that the bytes match the manifest. They do not show that the manifest is honest, nor that the writer was
correct. Here the files are read as an engine reads them, the linters run on them, the manifest's statements are
compared with them, and, if the parent is available, every number and every file is compared with the parent's.
"""
