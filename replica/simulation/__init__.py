"""Links and storages on paper: what rules that adapt would do, tried without moving a byte.

    replica simulate concurrency                      # every trace, ours beside FTS3's and fixed numbers
    replica simulate concurrency --trace shared_storage --decisions

`model` is the physics of one moment, `traces` are the worlds, `play` lets a policy live in one of them and counts.
Everything follows from the seed. To try a world of your own, make a `traces.Trace` and give it to `play.play`.
"""
