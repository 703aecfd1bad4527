"""What everything else stands on: errors, configuration, progress, files, locks, machine."""
