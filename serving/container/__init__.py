"""What container images need beside the package: pinned requirements, and a health check."""
