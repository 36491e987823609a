"""What is true and what should happen: the decisions of Replica, and nothing else.

Everything here is a function of its arguments. Nothing reads a clock, a file, the network or a database, nothing is
random, nothing logs; only the standard library is imported. So every decision can be repeated from its facts, tested
with plain values, and checked by a person with a pencil. `replica` gathers the facts, asks, and carries out the answer.

**The words.** `errors` is the tree of everything that can be wrong; decisions look at the branch, never at the text.
`names` reads and checks what people call things: a name that passed can become a path without another look.
`checksums` compares checksums, and keeps "they differ" apart from "it cannot be told". `quantities` prints bytes.

**The states.** `states` has every state of the system and every way from one to another, as tables. `rule_state` says
in which of them a rule is: that follows from its locks and is set by nobody.

**The places.** `endpoints` is an endpoint as the decisions see it: attributes, abilities, links, space; and the
Obstacle, the form in which every decision says why an endpoint did not serve. `expression_syntax` reads endpoint
expressions, a superset of Rucio's, into trees and prints them back. `expressions` says which endpoints a tree selects,
and when it selects none, which part of it became empty. `paths` makes of a file's name its path below an endpoint's
root.

**What is selected by its metadata.** `conditions` reads the language of searches and subscriptions, and says of one DID
whether a condition holds; a database is asked the same. `tokens` has what both languages are read from.

**The decisions.** `placement` chooses where missing copies go: what is already there first, then by space and lot,
never two copies in one failure domain, never more than fits; and for what cannot be placed it has a reason for every
candidate. `changes` says which copies a rule keeps when it wishes something else, and `relocation` which copies are
brought elsewhere, as their endpoint is drained or nothing arrives there any more. `approval` says whether a person must
be asked first, and `estimates` when copies will be there, as far as links were measured. `sources` ranks the copies a
transfer can read from, and says why and from how many at once; `routes` finds a way over other endpoints where no
direct one is allowed. `transfers` says what follows a failed attempt: another one after how long a pause, or the end.
Of what is queued, `shares` says whose turn it is, `lanes` in which order the heads of a queue go, `limits` what must
wait because as much as may be is in flight already; `concurrency` says how much that should be by what was measured,
with FTS3's way of doing so in `concurrency_fts` to compare; and `breakers` which endpoints are left alone since
they failed.
`subscriptions` makes the wishes of a standing one for a DID, and says what its metadata lack. `events` reads which
events somebody wants, and says when a server that did not take them is tried again. `quotas` says what an account may
still keep where. `deletion` says which copies must stay whatever the need, and how many may go.
`integrity` says when a doubt about a copy becomes a verdict, when too many doubts speak of the storage instead, and how
fast what is kept may be read again. `reconciling` says when the comparison of an endpoint with the catalogue is
believed, and when it is too bad to be true.
`permissions` says what an actor may do, and denies everything else.

A rule's life shows how they join: `permissions` lets the account ask; `expressions` turns the wish into candidates;
`placement` gives locks and refusals; `sources` finds each transfer its best source; `transfers` answers every failure;
`rule_state` reads off the locks whether the wish is fulfilled.
"""
