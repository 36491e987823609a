"""The way in over HTTP: REST, typed at the edge, with nothing of the domain in it.

`app` puts it together, `serve` runs it as a process. `middleware` knows who asks and whether they may; `routing` turns
a request into typed values and an answer into bytes; `work` runs functions of the catalogue in threads, a transaction
each; `errors` has the table of statuses; `openapi` describes all of it. Then one file a noun.

To add a route: a struct in replica.wire, a function in replica.catalog, a handler of two lines in the noun's file here
(its decorator names the action; its first docstring line is its summary), a method in the noun's file of
replica.client. To add a noun: a file here, its `routes` in `app.NOUNS`, its actions in rules.permissions.
"""
