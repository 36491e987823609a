"""Every Celery task there is.

Given     a message that says "look", from replica.hints or from anybody else who can reach the broker.
Returns   nothing.
Promises  only rings the bell of whoever listens to that queue: harmless however often, late or wrongly it comes.
Partner   workers.runtime keeps the bells.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task

from replica.hints import TASK
from workers import runtime


@shared_task(name=TASK, bind=True)  # type: ignore[untyped-decorator]
def look(self: Any) -> None:
    runtime.ring((self.request.delivery_info or {}).get("routing_key") or "")
