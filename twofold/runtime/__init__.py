"""What a running process can say of itself: where its time goes, and how late its event loop is."""
