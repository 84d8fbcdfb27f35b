"""The routers behind the gateway: which one answers, and the channel to it."""
