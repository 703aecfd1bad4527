"""What container images need besides the package: pinned requirements and a health check."""
