"""The asyncio client: calls, their order, the connection, the outcomes. It knows no threads and no surface."""
