"""Programs for people: chat, an OpenAI server, a playground in the browser."""
