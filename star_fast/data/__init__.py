"""Images become codes: sources of images, their views, the code store, and the preparation that joins them."""
