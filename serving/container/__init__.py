"""Files that the container images need besides the package: pinned requirements and a health check."""
