"""The whole contract of a store."""

from __future__ import annotations

from .appending import AppendContract
from .cancelling import CancelContract
from .document_transacting import DocumentTransactContract
from .documents import DocumentContract
from .reading import ReadContract
from .repositories import RepositoryContract
from .slicing import SliceContract
from .subscribing import SubscribeContract
from .transacting import TransactContract


class EventStoreContract(
    AppendContract,
    ReadContract,
    SubscribeContract,
    SliceContract,
    RepositoryContract,
    DocumentContract,
    TransactContract,
    DocumentTransactContract,
    CancelContract,
):
    """What every `EventStore` does, as tests.

    Subclass it in a test module and give it a fixture `store`, an open store without events::

        class TestMyStore(EventStoreContract):
            @pytest.fixture
            async def store(self):
                async with MyStore() as store:
                    yield store

    It needs anyio's pytest plugin in its auto mode (`anyio_mode = "auto"`), and runs on whatever
    loops the `anyio_backend` fixture names.
    """
