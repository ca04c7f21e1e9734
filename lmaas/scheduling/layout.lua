#!lua name=lmaas
-- The scheduler. Every function changes one pool atomically. There is no dispatcher process: each call that changes the state
-- (a gateway submits, releases or renews; a supervisor sends a heartbeat or has loaded an adapter; the reaper runs) also dispatches.
-- The parts of the library are joined in the order of PARTS in client.py. The last one has the functions.
--
-- A call costs O(log n) in the replicas, adapters, tenants and tickets of a pool. It reads facts by key and candidates from sorted sets;
-- none of what a call does grows with the fleet, and what may concern many tickets (their replica is lost, their gateways are gone) is
-- done in portions by the calls that follow.
--
-- KEYS[1] is `lmaas:{pool}`. The pool's other keys are that prefix with a suffix, so that a pool stays on one cluster slot:
--   :vars      hash  numbers and names (see FIGURES)
--   :usage     stream of usage events
-- Tickets:
--   :tickets   hash  ticket id → bytes (see `packed_ticket`)    :expiry    zset  ticket id → when its lease expires (ms)
--   :progress  hash  ticket id → tokens (see tokens_of)
--   :queue     zset  ticket id → sequence       :queue:T   zset  the tickets of tenant T that did not come back, in its order of service
--   :front     zset  ticket id → sequence, of tickets that came back: they have had their turn already
--   :sequences hash  tenant → its own sequence  :waiting   zset  tenant → counter, of tenants with a :queue:T
--   :counters  zset  tenant → counter, of all tenants
--   :needs     hash  queued ticket id → its needs (see needs_of)
--   :passed    hash  queued ticket id → how many tickets had been placed when it was first passed over
-- Background tickets wait in keys of the same form, whose names begin with `:background` (`:background:queue`, …). See yielding.lua.
-- Facts about replica R (see fleet.lua):
--   :replicas  hash  replica id → text (see `text_of`)    :held:R    zset  ticket id → sequence, of the tickets that hold slots there
--   :running:R hash  adapter → tickets that hold a slot with it    :used:R  hash  adapter → when a ticket was last placed with it
--   :resident:R set  adapters on its engine     :loading:R hash  adapter that it is to load → source
--   :waits:R|A zset  ticket id → sequence, of the tickets that hold a slot there until adapter A is loaded
--   :back:R    zset  ticket id → age, of the background tickets that hold slots there
-- Indices of replicas, which fleet.lua derives from these facts:
--   :free      zset  replica → share of its slots in use, of those that get work and have a free slot
--   :spare     zset  the same, of those that have a free adapter slot too
--   :crowded   zset  the same, of those that get work and have no free adapter slot
--   :runs:A    zset  replicas on which tickets hold a slot with adapter A    :has:A  zset  replicas on which adapter A is resident
--   :starting  zset  replica → since when       :due       zset  replica → when its silence matters next (ms), from which
--   its last heartbeat follows (see `beat_of`)
--   :yielding  zset  replica → age of its latest background ticket, of those that get work and on which background tickets hold slots
-- Tickets whose replica is lost or drains and that no call has reached yet:
--   :lost      list  numbers n                  :lost:n    zset  ticket id → sequence
-- What a tenant or a key has used of its limits is in `lmaas:limits:<id>` (see limits.lua), for all pools together. It is valid only for
-- the value that `lmaas:limits` had when it was written.
--
-- This memory may be lost, replaced by an older one (a snapshot, a replica that lagged), or written by another release. Then the pool is
-- rebuilt: it is emptied except for its usage events, and gets a new epoch. From the epoch the gateways see that they must report again
-- what waits, what runs and what ended lately.
--
-- A ticket is queued → (loading →) granted → gone; see TICKET. Time is the server's own (TIME), so other machines' clocks do not matter.
-- A pool's time never goes back: when the server's clock is set back, the pool adds the difference from then on. Only limits and months
-- follow the server's clock itself.

-- Grows with every change of the stored state that a library of another layout would misread. In all layouts, `:vars` is a hash with
-- `layout`, and with `mark` and `reaped` of at most PLAIN_MS ago; `:tickets` is a hash, of JSON with `event` before layout 4; and `:usage`
-- is a stream of events.
local LAYOUT = 4
local PLAIN_MS = 1000     -- less than LEASE_MS by far, see `is_of_newer`
local LEASE_MS = 6000     -- a gateway renews its leases every second
local STALE_MS = 5000     -- a replica without a heartbeat for this long gets no new work
local GONE_MS = 30000     -- after this long it is removed
local AWAY_MS = 3000      -- without any call for this long, the server was away
local PRESENT_MS = 10000  -- the controller reads every pool every second
local MAX_ATTEMPTS = 2    -- the first delivery and one more
local TURN_MS = 2000      -- the assumed run time of a request, until one is known
local START_MS = 20000    -- the assumed time of an engine's start, until one is known
local MAX_YIELDS = 16     -- background tickets that one call puts back
local MAX_REAPED = 64     -- tickets of lost gateways and of lost replicas that one call ends or takes back; the next call continues

-- Words that clients read, or that are stored. lmaas/scheduling/states.py has the same words and their meanings; a test compares the two,
-- and finds a name that is misspelt here.
local TICKET = {
  QUEUED = 'queued', LOADING = 'loading', GRANTED = 'granted', REVOKED = 'revoked', FAILED = 'failed', LOAD_FAILED = 'load_failed',
  YIELDED = 'yielded',
}
local NO_TICKET = {
  REFUSED = 'refused', REFUSED_BY_POOL = 'refused_by_pool', LIMITED = 'limited', UNSEEDED = 'unseeded', UNKNOWN = 'unknown',
}
local PHASE = { BUSY = 'busy', STARTING = 'starting', ASKED = 'asked' }
local REASON = { ENGINE = 'engine', ADAPTER = 'adapter' }
local SIGNAL = { LOAD = 'load', DEMAND = 'demand' }
local LIMIT = {
  CONCURRENCY = 'concurrency', REQUESTS = 'requests', TOKENS = 'tokens', REQUEST_TOKENS = 'request_tokens', MONTH_TOKENS = 'month_tokens',
  BUDGET = 'budget',
}
-- Of lmaas/states.py: a replica's observed states that matter here, and the ends of a request and of durable work whose process is gone.
local REPLICA = { STARTING = 'starting', READY = 'ready', DRAINING = 'draining' }
local LOST = { STATUS = 'lost', CODE = 'gateway_lost' }
local WASTED = { STATUS = 'wasted', CODE = 'runner_lost' }

-- Lua keeps each string once and finds it by a hash of its length and some 32 of its characters, of which the last is always one. Long
-- texts that differ in a few places, as JSON of tickets and replicas does, often have the same hash, and then each is compared with
-- hundreds. So such a text ends with white space that depends on a number.
local tails = {}
local function tail_of(number)
  number = number % 64
  local tail = tails[number]
  if not tail then
    tail = string.rep(' ', math.floor(number / 4)) .. string.sub(' \t\n\r', number % 4 + 1, number % 4 + 1)
    tails[number] = tail
  end
  return tail
end

-- What calls read and change most is stored as bytes of `struct` and `cmsgpack`, which cost a fraction of JSON, or of a field for each
-- number. These two are available in calls only, not while the library is loaded. Numbers begin with their high bytes, so that the last
-- byte of a text differs most (see `tail_of`).

-- The numbers that nearly every call needs, as one field of `:vars`; 0 where there is none:
--   reaped, offset, spare  the server's time at the last call; by how much this pool's is later; until when no one is given up
--   seq, placed       numbers given to tickets and placements so far
--   lost              the lists in `:lost`
--   last, floor       see fairness.lua
--   turn, active      when a slot was last taken, or a replica became ready; when there was last any demand
--   load, back, room  slots in use; those of background tickets; free slots of the replicas that get work
--   adapters          free adapter slots of the replicas that get work
--   queued, background_queued  the tickets that wait
--   loading           the adapters that replicas are to load
--   arrived           see reserve.lua
--   calm              until when no replica has been silent for too long and no lease has expired; see `reap`
--   run_ms            the moving average of the time that an interactive ticket runs
--   controller        when the controller last read the pool
--   mark              grows with each call and across epochs
-- The other fields of `:vars` are read when they are needed:
--   layout, epoch, began, run, base  see `begin_epoch` and `open`
--   reaped, mark      copies for other releases, at most PLAIN_MS old
--   start_ms, first_ms, delay_ms  see `lmaas_heartbeat` and `lmaas_stats`
--   lives             numbers given to replicas and to lists of lost tickets
--   slots, able       the slots of ready replicas; the replicas that may get work sooner or later
--   open, open_slots  the replicas that get work, and their slots
--   boost, boost_at   see reserve.lua
--   ages, yields      numbers given to background tickets that were placed; background tickets that were put back
--   background_placed, background_last, background_floor  `placed`, `last` and `floor` of background tickets
local FIGURES = '>Bc0dllllllllllllllllllll'

local function packed_figures(vars)
  return struct.pack(
    FIGURES, #vars.last, vars.last, vars.floor, vars.offset, vars.spare, vars.seq, vars.placed, vars.lost, vars.turn, vars.active,
    vars.load, vars.back, vars.room, vars.adapters, vars.queued, vars.background_queued, vars.loading, vars.arrived, vars.calm, vars.run_ms,
    vars.controller, vars.reaped, vars.mark
  )
end

-- Reads what `packed_figures` wrote into a table.
local function read_figures(vars, text)
  vars.last, vars.floor, vars.offset, vars.spare, vars.seq, vars.placed, vars.lost, vars.turn, vars.active, vars.load, vars.back, vars.room,
    vars.adapters, vars.queued, vars.background_queued, vars.loading, vars.arrived, vars.calm, vars.run_ms, vars.controller,
    vars.reaped, vars.mark = struct.unpack(FIGURES, text)
end

-- Sets the figures of an empty pool.
local function clear_figures(vars, mark, wall)
  vars.last, vars.floor, vars.offset, vars.spare, vars.seq, vars.placed, vars.lost, vars.turn, vars.active = '', 0, 0, 0, 0, 0, 0, 0, 0
  vars.load, vars.back, vars.room, vars.adapters, vars.queued, vars.background_queued, vars.arrived, vars.calm = 0, 0, 0, 0, 0, 0, 0, 0
  vars.loading, vars.run_ms, vars.controller, vars.reaped, vars.mark = 0, TURN_MS, 0, wall, mark
end

-- A ticket is stored as what changes of it, and behind that what its client has sent, unchanged, since to copy that costs less than to
-- encode it. What was sent is one MessagePack array (see `Ticket.sent` in client.py). Behind its other values are the usage event, which is
-- read only when the gateway is gone, and a number that has the purpose of `tail_of`.
local STATE = '>Bc0HllllldHc0Hc0Hc0'
local SENT_VALUES = 15  -- before the event
local SENT_AT = 3       -- the bytes of the array's head

-- Returns a ticket from what was sent, which is in `text` behind `before` bytes, and from what changes of it.
local function ticket_from(text, before, state, attempts, submitted, sequence, placed, granted, life, held, replica, revoked, reserved)
  local event_at, id, tenant, gateway, adapter, source, weight, share, head_start, prompt_tokens, completion_tokens, prompt_price,
    cached_price, completion_price, background, durable = cmsgpack.unpack_limit(text, SENT_VALUES, before + SENT_AT)
  -- A table that gets its fields when it is made costs much less than one to which they are added.
  return {
    text = text, before = before, event_at = event_at, id = id, tenant = tenant, gateway = gateway, adapter = adapter, source = source,
    weight = weight, share = share, head_start = head_start, prompt_tokens = prompt_tokens, completion_tokens = completion_tokens,
    prompt_price = prompt_price, cached_price = cached_price, completion_price = completion_price, background = background,
    durable = durable, state = state, attempts = attempts, submitted = submitted, sequence = sequence, placed = placed, granted = granted,
    life = life, held = held, replica = replica, revoked = revoked, reserved = reserved,
  }
end

-- Returns a ticket from what is stored of it.
local function ticket_of(text)
  local state, attempts, placed, granted, life, held, submitted, sequence, replica, revoked, reserved, sent_at = struct.unpack(STATE, text)
  local holds = life > 0
  return ticket_from(
    text, sent_at - 1, state, attempts, submitted, sequence, placed > 0 and placed or nil, granted > 0 and granted or nil,
    holds and life or nil, holds and held or nil, holds and replica or nil, revoked ~= '' and revoked or nil, reserved
  )
end

local function packed_ticket(ticket)
  local replica, revoked, reserved = ticket.replica or '', ticket.revoked or '', ticket.reserved
  local sent = ticket.before == 0 and ticket.text or string.sub(ticket.text, ticket.before + 1)
  return struct.pack(
    STATE, #ticket.state, ticket.state, ticket.attempts, ticket.placed or 0, ticket.granted or 0, ticket.life or 0, ticket.held or 0,
    ticket.submitted, ticket.sequence or 0, #replica, replica, #revoked, revoked, #reserved, reserved
  ) .. sent
end

-- Returns the usage event (JSON) of a ticket, which is recorded if its gateway dies.
local function event_of(ticket)
  local _, event = cmsgpack.unpack_one(ticket.text, ticket.event_at)
  return event
end
