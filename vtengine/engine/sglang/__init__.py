"""SGLang as a `Backend`: in this process (`SglangEngineBackend`) or a running server (`SglangHttpBackend`).

Neither SGLang nor an HTTP client is imported before the first backend is made.
"""

from vtengine.engine.sglang.backend import SglangBackend as SglangBackend
from vtengine.engine.sglang.backend import SglangEngineBackend as SglangEngineBackend
from vtengine.engine.sglang.backend import SglangHttpBackend as SglangHttpBackend
from vtengine.engine.sglang.served import ServedModel as ServedModel
from vtengine.engine.sglang.transport import ServerUnsuitable as ServerUnsuitable
