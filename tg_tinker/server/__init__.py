"""The HTTP server: aiohttp.web in front, one device thread behind. The model work itself is in ``engine``."""
