"""The cheap gates again, on finished artifacts: what an exporter proved when it wrote, whoever wrote since.

Hashes show that bytes are those of the manifest. They do not show that the manifest is honest, nor that the writer was
right. Here the files are read as an engine reads them, the linters run on them, the manifest's statements are compared
with them, and, where the parent is at hand, every number and every file is compared with it.
"""
