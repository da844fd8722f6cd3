"""What three clouds have in common where their libraries differ: whole files, folders, and words for what is refused."""

import builtins
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

from actors.config.places import resolved
from actors.storage import clouds, object_folder
from actors.storage.clouds import azure_names, connection_settings, open_storage
from actors.storage.folder import open_folder
from actors.storage.object_folder import ObjectFolder
from tests.cloud_world import ACCOUNT, KEY, azure_place, connection, google_place
from tests.s3_world import BUCKET, environment

CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"


def test_a_file_that_is_written_anew_is_never_seen_half(anywhere: str) -> None:
    folder, done = ObjectFolder(anywhere), threading.Event()
    folder.write("state", b"0" * 1000)

    def look() -> set[tuple[bytes, int | None]]:
        seen = set()
        while not done.is_set():
            seen.add((folder.read("state"), folder.size("state")))
        return seen

    with ThreadPoolExecutor(1) as reader:
        looking = reader.submit(look)
        for _ in range(20):
            folder.write("state", b"1" * 1000)
        done.set()
        assert looking.result() <= {(b"0" * 1000, 1000), (b"1" * 1000, 1000)}


def test_files_of_all_sizes_and_names_come_back(anywhere: str, tmp_path: Path) -> None:
    folder, large = open_folder(anywhere), os.urandom(20_000_000)
    (tmp_path / "large").write_bytes(large)
    written = {"empty": b"", "a b+c%2F'é.txt": b"text", "inner/most/x": b"x"}
    for name, content in written.items():
        folder.write(name, content)
    assert isinstance(folder, ObjectFolder)
    folder.upload(tmp_path / "large")
    folder.write("buffer", pa.py_buffer(b"of Arrow"))
    assert folder.sizes() == {"empty": 0, "a b+c%2F'é.txt": 4, "large": 20_000_000, "buffer": 8}
    assert folder.folders() == ["inner"] and sorted(folder.names()) == sorted([*folder.sizes(), "inner"])
    assert folder.files().keys() == {*written, "large", "buffer"}
    assert [folder.read(name) for name in written] == list(written.values())
    assert folder.read("large") == large and folder.read_range("large", 10_000_000, 10_000_003) == large[10_000_000:10_000_003]
    assert folder.size("inner") is None and folder.size("nothing") is None
    folder.remove("inner/most/x")
    assert folder.size("inner/most/x") is None


def test_many_are_removed_at_once(anywhere: str) -> None:
    folder = ObjectFolder(anywhere)
    names = [f"claims/{number}" for number in range(30)]

    def once(name: str) -> None:
        folder.write(name, b"1")
        folder.remove(name)
        folder.remove(name)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(once, names))
    assert folder.files() == {}


@pytest.mark.parametrize("server", ["google", "azure"])
def test_a_bucket_that_is_not_there_is_told_to_who_writes(server: str, request: pytest.FixtureRequest) -> None:
    place = (google_place("x") if server == "google" else azure_place("x")).replace(BUCKET, "nowhere")
    with environment(request.getfixturevalue(server)):
        assert open_folder(place).sizes() == {}
        with pytest.raises(ValueError, match=rf"{place}: cannot write a: there is no such bucket; make it, or name another"):
            open_folder(place).write("a", b"1")


def test_a_wrong_key_of_azure_is_refused(azure: dict[str, str]) -> None:
    wrong = azure[CONNECTION].replace(KEY, KEY[:-8] + "AAAAAAA=")
    with environment({CONNECTION: wrong}):
        for ask in (lambda folder: folder.sizes(), lambda folder: folder.write("a", b"1"), lambda folder: folder.size("a")):
            with pytest.raises(ValueError, match=r"the keys are not valid there; .*AZURE_STORAGE_CONNECTION_STRING, or the role"):
                ask(open_folder(azure_place("x")))


def test_who_has_no_keys_is_told_which_would_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody gives this machine a token, and nothing is listening where one is asked for."""
    monkeypatch.setattr(clouds, "GOOGLE_RETRY_SECONDS", 1)
    nobody = {"HOME": str(tmp_path), "GCE_METADATA_ROOT": "127.0.0.1:1", "GCE_METADATA_HOST": "127.0.0.1:1", CONNECTION: ""}
    with environment(nobody):
        for place in (f"gs://{BUCKET}/x", azure_place("x")):
            with pytest.raises(ValueError, match=rf"{place}: cannot list files: no keys are found, .*CONNECTION_STRING or their"):
                open_folder(place).sizes()


def test_addresses_of_azure_name_the_account_or_leave_it_to_the_connection_string() -> None:
    with environment({CONNECTION: connection(1)}):
        for place in (azure_place("a/b"), f"abfs://{BUCKET}/a/b", f"abfs://{ACCOUNT}@{BUCKET}/a/b"):
            assert open_storage(place)[1] == f"{BUCKET}/a/b"
        with pytest.raises(ValueError, match=rf"is of the account 'other', and {CONNECTION} of '{ACCOUNT}'; the former's"):
            open_folder(f"abfs://{BUCKET}@other.dfs.core.windows.net/a")
    with environment({CONNECTION: ""}):
        assert open_storage(azure_place("a/b"))[1] == f"{BUCKET}/a/b"
        would = f"; abfs://container@account.dfs.core.windows.net/folder would do, or abfs://container/folder with {CONNECTION}"
        for place, why in (
            (f"abfs://{BUCKET}/a/b", "it names no account"),
            (f"abfs://{BUCKET}@{ACCOUNT}.blob.core.windows.net/a", "its host is no .dfs. one"),
            (f"abfs://{ACCOUNT}.dfs.core.windows.net/{BUCKET}/a", "its host is no .dfs. one"),
            (f"{azure_place('a')}?sig=x", "it has a question mark"),
        ):
            with pytest.raises(ValueError, match=f"is not accepted: {why}{would}"):
                open_folder(place)
    china = f"abfss://{BUCKET}@{ACCOUNT}.dfs.core.chinacloudapi.cn/a/b"
    assert azure_names(china, {}) == (ACCOUNT, BUCKET, "core.chinacloudapi.cn") and open_storage(china)[1] == f"{BUCKET}/a/b"
    settings = {"accountname": ACCOUNT, "endpointsuffix": "core.chinacloudapi.cn"}
    assert azure_names(f"abfs://{BUCKET}/a", settings) == (ACCOUNT, BUCKET, "core.chinacloudapi.cn")


def test_a_shared_signature_serves_and_is_never_shown(azure: dict[str, str]) -> None:
    signature = generate_account_sas(
        ACCOUNT, KEY, ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, add=True, create=True),
        datetime.now(UTC) + timedelta(hours=1),
    )  # fmt: skip
    endpoint = next(field for field in azure[CONNECTION].split(";") if field.startswith("BlobEndpoint="))
    for token in (signature, f"?{signature}"):
        with environment({CONNECTION: f"AccountName={ACCOUNT};SharedAccessSignature={token};{endpoint}"}):
            folder = ObjectFolder(azure_place("signed"))
            folder.write("a", b"1")
            assert folder.sizes() == {"a": 1} and folder.read("a") == b"1"
            folder.remove("a")
            assert folder.sizes() == {}
    secret = signature.rpartition("sig=")[2].partition("&")[0]
    wrong = signature.replace(secret, "A" * 40)
    with environment({CONNECTION: f"AccountName={ACCOUNT};SharedAccessSignature={wrong};{endpoint}"}):
        for ask in (lambda: ObjectFolder(azure_place("signed")).sizes(), lambda: ObjectFolder(azure_place("s")).write("a", b"")):
            with pytest.raises(ValueError, match="the keys are not valid there") as error:
                ask()
            assert "A" * 40 not in str(error.value)


def test_one_who_was_let_in_waits_for_a_token_that_is_late(google: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_folder, "FIRST_PAUSE_SECONDS", 0.01)
    with environment(google):
        folder, real = ObjectFolder(google_place("late")), clouds.CloudStorage.write
        troubles = [OSError("Could not create a OAuth2 access token to authenticate the request.")] * 2

        def late(self: clouds.CloudStorage, path: str, content: bytes) -> None:
            if troubles:
                raise troubles.pop()
            real(self, path, content)

        monkeypatch.setattr(clouds.CloudStorage, "write", late)
        with pytest.raises(ValueError, match="no keys are found"):
            folder.write("a", b"1")
        assert folder.sizes() == {}
        folder.write("a", b"1")
        assert folder.sizes() == {"a": 1} and not troubles


def test_a_connection_string_without_an_account_is_refused_and_not_shown() -> None:
    assert connection_settings("") == {}
    assert connection_settings("AccountName=a; AccountKey=k==;") == {"accountname": "a", "accountkey": "k=="}
    with pytest.raises(ValueError, match=rf"{CONNECTION} names no account; AccountName=…;AccountKey=… would do") as error:
        connection_settings("SharedAccessSignature=secret")
    assert "secret" not in str(error.value)


def test_azure_without_its_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_azure(name: str, *rest: Any) -> Any:
        if name.startswith("azure"):
            raise ModuleNotFoundError("No module named 'azure'", name="azure")
        return real(name, *rest)

    clouds._azure_service.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_azure)
    with pytest.raises(ValueError, match=r"a library that is not here \(No module named 'azure'\); pip install '.\[azure\]'"):
        open_folder(azure_place("x"))


def test_public_buckets_need_no_key_and_others_hold_none() -> None:
    assert resolved("gs://anonymous@bucket/rows") == "gs://anonymous@bucket/rows"
    for place in ("gs://somebody@bucket/rows", "s3://anonymous@bucket/rows", "abfs://account:key@container/rows"):
        with pytest.raises(ValueError, match="holds a key, which would be written into files that others read"):
            resolved(place)


def test_what_is_left_below_a_folder_that_was_to_go_is_told(monkeypatch: pytest.MonkeyPatch, google: dict[str, str]) -> None:
    monkeypatch.setattr(object_folder, "PATIENCE_SECONDS", 0.0)
    with environment(google):
        folder = ObjectFolder(google_place("full"))
        folder.write("inner/a", b"1")
        monkeypatch.setattr(clouds.CloudStorage, "remove_folder", lambda self, path: None)
        with pytest.raises(object_folder.StorageError, match=f"there is still something below {BUCKET}/full/inner"):
            folder.remove_folder("inner")
