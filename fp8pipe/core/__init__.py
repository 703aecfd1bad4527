"""Foundations used by all other packages: errors, configuration, progress, devices, machine, process guard, plans."""
