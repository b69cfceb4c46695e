"""The server, asked over a socket as a browser asks it, and as others may."""

import http.client
import json
import threading

import numpy as np
import pytest
import uvicorn

from weakmedsam.errors import ConfigError
from weakmedsam.review.guard import KEY, listen, read_key
from weakmedsam.review.server import build_app
from weakmedsam.review.session import Session
from weakmedsam.run.clicks import read_reviewed

JSON = {"Content-Type": "application/json"}


class Client:
    """What a browser that has opened the printed address sends, unless told otherwise."""

    def __init__(self, session, port, key):
        self.session, self.port, self.key = session, port, key
        self.cookie = {"Cookie": f"weakmedsam_review_{port}={key}"}

    def ask(self, path, body=None, cookie=True, **headers):
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = None if body is None else body if isinstance(body, str) else json.dumps(body)
        own = {**(self.cookie if cookie else {}), **(JSON if body is not None else {})}
        line.request(
            "GET" if body is None else "POST",
            path,
            sent,
            {**own, **{k.replace("_", "-"): v for k, v in headers.items()}},
        )
        answer = line.getresponse()
        content = answer.read()
        line.close()
        return answer.status, dict(answer.getheaders()), content


@pytest.fixture
def client(run):
    session = Session(run)
    with listen(0) as door:
        port, key = door.getsockname()[1], read_key(run)
        server = uvicorn.Server(uvicorn.Config(build_app(session, port, key), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        yield Client(session, port, key)
        server.should_exit = True
        thread.join()


def a_click(session):
    name, case = next(iter(session.cases.items()))
    z = case.rows[0]
    c = int(np.flatnonzero(case.present[z])[0])
    return name, {"slice": z, "x": 12, "y": 7, "sign": 1, "class": session.class_names[c]}


def test_a_click_goes_there_and_back(client):
    name, body = a_click(client.session)
    cases = json.loads(client.ask("/cases")[2])
    assert [case["name"] for case in cases] == list(client.session.cases)
    told = json.loads(client.ask(f"/cases/{name}")[2])
    assert told["points"] == []
    status, _, content = client.ask(f"/cases/{name}/click", body, Origin=f"http://127.0.0.1:{client.port}")
    assert status == 200
    found = json.loads(content)
    assert found["clicks"] == 1
    assert found["points"] == [[body["slice"], 12, 7, 1, body["class"]]]
    runs = np.array(found["slices"][str(body["slice"])]).reshape(-1, 2)
    slice_ = np.repeat(runs[:, 0], runs[:, 1]).reshape(32, 32)
    status, headers, content = client.ask(f"/cases/{name}/label.raw")
    assert headers["x-shape"] == "12,32,32"
    np.testing.assert_array_equal(np.frombuffer(content, np.uint8).reshape(12, 32, 32)[body["slice"]], slice_)
    assert json.loads(client.ask(f"/cases/{name}/undo", {})[2])["clicks"] == 0
    assert client.ask(f"/cases/{name}/undo", {})[0] == 409


@pytest.mark.parametrize("layer", ["image", "original", "label", "cam", "prediction", "mask"])
def test_layers_are_sent_as_numbers(client, layer):
    name = next(iter(client.session.cases))
    status, headers, content = client.ask(f"/cases/{name}/{layer}.raw")
    shape = tuple(map(int, headers["x-shape"].split(",")))
    assert status == 200
    assert shape == ((12, 2, 8, 8) if layer == "cam" else (12, 32, 32))
    assert len(content) == np.prod(shape) * (2 if layer == "image" else 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"cookie": False},
    ],
)
def test_others_are_refused_and_nothing_is_kept(client, headers):
    name, body = a_click(client.session)
    assert client.ask(f"/cases/{name}/click", body, **headers)[0] == 403
    if "Content_Type" not in headers:
        assert client.ask("/", **headers)[0] == 403
        assert client.ask(f"/cases/{name}/image.raw", **headers)[0] == 403
    assert read_reviewed(client.session.run).clicks == ()


def test_the_key_opens_the_page_once_and_for_all(client):
    status, headers, _ = client.ask(f"/?key={client.key}", cookie=False)
    assert status == 303
    assert client.key in headers["set-cookie"]
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()
    assert client.ask(f"/?key={client.key[:-1]}", cookie=False)[0] == 403
    assert client.ask("/cases?key=" + client.key, cookie=False)[0] == 403
    path = client.session.run / "review" / KEY
    assert path.stat().st_mode & 0o077 == 0
    assert read_key(client.session.run) == client.key
    status, headers, content = client.ask("/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in content.replace(b"http://www.w3.org", b"")  # one page, nothing from elsewhere
    assert b"https://" not in content


@pytest.mark.parametrize(
    "path",
    [
        "/cases/..%2f..%2fclassify/image.raw",
        "/cases/../../etc/passwd",
        "/cases/none/label.raw",
        "/cases/NAME/secret.raw",
        "/cases/NAME/..%2f..%2fcheckpoints.raw",
        "/templates/page.html",
        "/../.key",
    ],
)
def test_only_known_cases_and_layers_are_read(client, path):
    name = next(iter(client.session.cases))
    assert client.ask(path.replace("NAME", name))[0] == 404


@pytest.mark.parametrize(
    "change",
    [
        *({"slice": -1}, {"slice": 99}, {"x": 32}, {"x": 1.5}, {"x": "1"}, {"y": True}),
        *({"sign": 0}, {"class": "liver"}, {"class": None}),
    ],
)
def test_a_click_that_cannot_be_is_refused(client, change):
    name, body = a_click(client.session)
    assert client.ask(f"/cases/{name}/click", body | change)[0] == 400
    assert client.ask("/cases/none/click", body)[0] == 404
    assert read_reviewed(client.session.run).clicks == ()


@pytest.mark.parametrize("body", ["", "{", "[1]", "null", "{}", '{"slice": NaN}', "x" * 20_000])
def test_a_body_that_is_none_is_refused(client, body):
    name, _ = a_click(client.session)
    assert client.ask(f"/cases/{name}/click", body)[0] in (400, 403)


def test_decisions_are_kept_and_taken_back(client):
    name = next(iter(client.session.cases))
    for number, decision in ((None, "accepted"), (3, "rejected")):
        answer = client.ask(f"/cases/{name}/decide", {"slice": number, "decision": decision})
        assert answer[0] == 200
    told = json.loads(answer[2])
    assert told["decision"] == "accepted"
    assert told["rejected"] == [3]
    assert told["states"][3] == 3
    assert client.ask(f"/cases/{name}/decide", {"slice": None, "decision": "perhaps"})[0] == 400
    client.ask(f"/cases/{name}/decide", {"slice": None, "decision": None})
    assert [held[1:3] for held in read_reviewed(client.session.run).decisions] == [(3, "rejected")]


def test_a_port_in_use_is_named():
    with listen(0) as door, pytest.raises(ConfigError, match=r"--port \d+: Address already in use; choose another"):
        listen(door.getsockname()[1])
    with pytest.raises(ConfigError, match=r"--port is 99999; it must be in \[0, 65,535\]"):
        listen(99_999)
