"""Programs for people: a chat in the terminal, a server of OpenAI's API, a page in the browser."""
