"""A stand-in for W&B's server on this machine: takes runs, figures, files and artifacts, and can be shut."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0" * 40
"""An API key that wandb takes for one; the server does not look at it."""


def answer(name, given, base, history=()):
    """What the real server answers to a GraphQL operation, as far as wandb's client reads it.

    ``history`` are the rows it has of the run that is asked for.
    """

    def files(names):
        return [{"name": n, "displayName": n, "uploadUrl": f"{base}/store/{n}", "uploadHeaders": [],
                 "storagePath": f"wandb_artifacts/{n}", "artifact": {"id": "QXJ0"}} for n in names]  # fmt: skip

    def edges(names):
        return {"edges": [{"node": node} for node in files(names)]}

    bucket = {
        "id": "UnVu", "name": given.get("name"), "displayName": given.get("name"), "config": "{}", "sweepName": None,
        "historyLineCount": 0, "project": {"id": "UA==", "name": "weakmedsam", "entity": {"id": "RQ==", "name": "me"}},
    }  # fmt: skip
    put = given.get("input", {})
    asked = given.get("files", []) or [spec["name"] for spec in put.get("artifactFiles", [])]
    held = {
        **bucket, "logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(history), "summaryMetrics": "{}",
        "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]), "eventsTail": "[]", "tags": [],
        "wandbConfig": '{"t": 1}',
    }  # fmt: skip
    known = {"model": {**bucket["project"], "bucket": held}} if history else {}
    manifest = {"artifactManifest": {"id": "TQ==", "file": files(["wandb_manifest.json"])[0]}}
    sequence = {"id": "Uw==", "latestArtifact": None}
    number = f"{put.get('artifactCollectionName')}@{put.get('digest')}"
    return {
        "Viewer": {"viewer": {"id": "VQ==", "entity": "me", "username": "me", "teams": {"edges": []}}},
        "ArtifactType": {"project": None},
        "RunResumeStatus": known,
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "CreateRunFiles": {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files(asked)}},
        "CreateArtifact": {
            "createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": sequence}}
        },
        "CreateArtifactManifest": {"createArtifactManifest": manifest},
        "UpdateArtifactManifest": {"updateArtifactManifest": manifest},
        "CreateArtifactFiles": {"createArtifactFiles": {"files": edges(asked)}},
        "CommitArtifact": {"commitArtifact": {"artifact": {"id": given.get("artifactID"), "digest": ""}}},
        "UseArtifact": {"useArtifact": {"artifact": {"id": put.get("artifactID")}}},
    }.get(name, {})  # fmt: skip


class Server(ThreadingHTTPServer):
    """Answers at ``url`` and keeps what it was told until it is shut.

    Attributes:
        told: (operation or path, variables or body) in order.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.told = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shut(self):
        """Refuse all further connections, and cut those that are open."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up is no error."""

    def variables(self, name):
        """Of all calls of an operation."""
        return [given for told, given in self.told if told == name]

    def runs(self):
        """Name of each run -> its number."""
        return {given["displayName"]: given["name"] for given in self.variables("UpsertBucket") if given["displayName"]}

    def config(self, run):
        """A run's settings, by its number."""
        told = [given["config"] for given in self.variables("UpsertBucket") if given["name"] == run and given["config"]]
        return {key: value["value"] for key, value in json.loads(told[-1]).items()}

    def history(self, run=""):
        """All rows of figures that have arrived, or those of one run."""
        rows = []
        for path, body in self.told:
            if path.endswith(f"{run}/file_stream"):
                part = body.get("files", {}).get("wandb-history.jsonl", {"content": []})
                rows += [json.loads(line) for line in part["content"]]
        return rows


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            sent = json.loads(body)
        except ValueError:
            sent = {}
        name, given = self.path, sent
        if self.path == "/graphql":
            name = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"]).group(1)
            given = sent.get("variables") or {}
        self.server.told.append((name, given))
        history = self.server.history(given.get("name", "-")) if name == "RunResumeStatus" else ()
        found = answer(name, given, self.server.url, history) if self.path == "/graphql" else None
        reply = json.dumps({} if found is None else {"data": found}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *args):
        pass
