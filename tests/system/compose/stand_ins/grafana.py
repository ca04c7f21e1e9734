"""NOT Grafana: reports that it is healthy if the provisioned files are there and parse, and a password is set."""

import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

for provisioned in ("datasources", "dashboards"):
    files = list(Path("/etc/grafana/provisioning", provisioned).glob("*.yaml"))
    assert files, provisioned
    assert all("apiVersion: 1" in file.read_text() for file in files), provisioned
dashboard = json.loads(Path(os.environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).read_text())
assert dashboard["panels"]
assert os.environ["GF_SECURITY_ADMIN_PASSWORD"]
Path("/var/lib/grafana/here").touch()


class Health(BaseHTTPRequestHandler):
    """The health endpoint."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
        self.wfile.write(b'{"database": "ok", "version": "stand-in"}')


HTTPServer(("", 3000), Health).serve_forever()
