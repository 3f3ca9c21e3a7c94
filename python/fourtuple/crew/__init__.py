"""Processes that play a Python script on many connections: what `fourtuple load --script` starts where a script has an
`async def session(connection)`.

`worker` is one such process; `tally` is what it tells and is told. Who starts them is `fourtuple.load.sessions`.
Importing this costs a worker little: neither pydantic nor the engine is loaded.
"""
