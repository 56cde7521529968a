"""make quickstart: base, adapter, merged model and their answers, in minutes."""
