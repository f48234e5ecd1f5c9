"""RabbitMQ as the serving path uses it: what is imported from here is all that other files need.

``amqp.py`` has the queues and the thread that owns a connection, ``publisher.py`` is ``ports.JobQueue``,
``consumer.py`` is ``ports.JobSource``; these are the only files that know pika.
"""

from axon_llm.serving.amqp import DEAD, DEAD_LETTERS, declare, jobs_queue, parameters, reach, suspects_queue
from axon_llm.serving.consumer import Consumer
from axon_llm.serving.publisher import Publisher

__all__ = [
    "DEAD",
    "DEAD_LETTERS",
    "Consumer",
    "Publisher",
    "declare",
    "jobs_queue",
    "parameters",
    "reach",
    "suspects_queue",
]
