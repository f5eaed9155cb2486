"""SGLang as a `Backend`: in this process (`SglangEngineBackend`), a running server (`SglangHttpBackend`), or several
(`SglangFleet`).

Neither SGLang nor an HTTP client is imported before the first backend is made.
"""

from vtengine.engine.sglang.backend import SglangBackend as SglangBackend
from vtengine.engine.sglang.connect import SglangEngineBackend as SglangEngineBackend
from vtengine.engine.sglang.connect import SglangHttpBackend as SglangHttpBackend
from vtengine.engine.sglang.connect import addresses as addresses
from vtengine.engine.sglang.connect import connect_servers as connect_servers
from vtengine.engine.sglang.connect import resolve as resolve
from vtengine.engine.sglang.fleet import SglangFleet as SglangFleet
from vtengine.engine.sglang.served import ServedModel as ServedModel
from vtengine.engine.sglang.transport import ServerUnsuitable as ServerUnsuitable
