"""The model work: base models, adapters, training passes, sampling. No HTTP, no asyncio, no tenants.

Everything here is synchronous and is called from one device thread.
"""
