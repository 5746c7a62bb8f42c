"""`skimlm serve`: an OpenAI-compatible server of one model and a folder of skills.

app, schema, guard     routes; what requests may hold; who may ask
engine, sampling       continuous batching; the next token
prompt, skills         what a request asks, what stands before it
answer, text, forms    tokens to text, as they come; how that is written
shape, tools           answers that keep to a JSON schema, that call tools
metrics, page/         what is counted; a page to chat on
"""
