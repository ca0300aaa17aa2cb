"""What the server tells about itself: metrics, traces and logs."""
