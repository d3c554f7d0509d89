"""The gRPC services: each a thin layer over ControlPlane."""
