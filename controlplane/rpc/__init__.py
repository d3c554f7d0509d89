"""gRPC plumbing: handlers from descriptors, statuses with field names, the shared token."""
