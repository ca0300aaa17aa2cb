"""HTTP: the routes, requests made ready for the engine, and answers as OpenAI's API has them."""
