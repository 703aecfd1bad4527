"""Modules used by all other packages: errors, configuration, progress, devices, machine, process guard and plans."""
