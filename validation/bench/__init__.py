"""What an export does here, measured: its speed and size, and whether its service answers as it must.

Validation proves numbers; this measures and asks. Both leave a record beside the export.
"""
