-- The pool as a call sees it: how it is read, written, and started anew when its memory cannot be trusted.

-- The id of the server process. A new process may have lost the memory of the one before it. It is read once per process.
local process = nil

-- Decodes token counts, which clients send and `:progress` stores as JSON `[prompt, cached, completion]`; returns nil for ''. Releases
-- before layout 4 store them without the brackets too.
local function tokens_of(text)
  local prompt, cached, completion = string.match(text, '(%d+),(%d+),(%d+)')
  return prompt and { prompt = tonumber(prompt), cached = tonumber(cached), completion = tonumber(completion) }
end

-- Returns the tokens of a ticket's last checkpoint; nil before the first.
local function progress(pool, ticket)
  return tokens_of(redis.call('HGET', pool.at.progress, ticket.id) or '')
end

-- Records the usage event of a ticket whose gateway is gone. If the gateway reports its own event later, the ledger replaces this one.
local function record_lost(pool, ticket)
  local event = cjson.decode(ticket.event or event_of(ticket))
  local used = progress(pool, ticket) or { prompt = 0, cached = 0, completion = 0 }
  event.status, event.code = LOST.STATUS, LOST.CODE
  if ticket.durable then event.status, event.code = WASTED.STATUS, WASTED.CODE end
  event.prompt_tokens, event.cached_tokens, event.completion_tokens = used.prompt, used.cached, used.completion
  event.queue_ms = (ticket.placed or pool.now) - ticket.submitted
  event.load_ms = ticket.placed and (ticket.granted or pool.now) - ticket.placed or 0
  event.run_ms = ticket.granted and pool.now - ticket.granted or 0
  event.replica_id = ticket.replica or ticket.revoked or cjson.null
  redis.call('XADD', pool.key .. ':usage', '*', 'event', cjson.encode(event))
  return used
end

-- Returns a field of `:vars` as text, or ''.
local function text_of(pool, name)
  local value = pool.vars[name]
  if value == nil then value = pool.others[name] end
  if value == nil then
    value = redis.call('HGET', pool.at.vars, name) or ''
    pool.others[name] = value
  end
  return value
end

-- Returns a number of the pool. Those of FIGURES are in `pool.vars` in any case.
local function var(pool, name, default)
  local value = pool.vars[name]
  if value == nil then value = pool.others[name] end
  if value == nil then
    value = tonumber(redis.call('HGET', pool.at.vars, name) or nil) or false
    pool.others[name] = value
  end
  return value or default
end

-- Sets a field of `:vars`, which `close` writes.
local function set_var(pool, name, value)
  if pool.vars[name] ~= nil then
    pool.vars[name] = value
  else
    pool.others[name], pool.written[name] = value, value
  end
end

-- Returns the next number of a counter of the pool.
local function next_of(pool, name)
  local value = var(pool, name, 0) + 1
  set_var(pool, name, value)
  return value
end

-- Moves a moving average by an eighth of the difference, so that it follows about the last dozen values.
local function average(old, value)
  return math.floor(old + (value - old) / 8)
end

-- What this process knows of each pool since its last call: {mark, epoch, began, base, plain (when the copies for other releases were
-- written)}. While the mark continues from there, no other library was used. Nothing else is kept from call to call: with thousands of
-- pools and replicas, to read their bytes again costs less than to find tables in memory that is not in the processor's caches.
local seen_last = {}

-- The names of the keys that most calls need, of each pool that this process has used. To put a name together costs as much as a command.
local names = {}

local function names_of_keys(prefix)
  local found = {
    vars = prefix .. ':vars', tickets = prefix .. ':tickets', expiry = prefix .. ':expiry', replicas = prefix .. ':replicas',
    progress = prefix .. ':progress', due = prefix .. ':due', free = prefix .. ':free', spare = prefix .. ':spare',
    crowded = prefix .. ':crowded', starting = prefix .. ':starting', yielding = prefix .. ':yielding', counters = prefix .. ':counters',
    background = prefix .. ':background', background_counters = prefix .. ':background:counters',
  }
  names[prefix] = found
  return found
end

-- The pool as the present call sees it. There is one call at a time, and to make these tables anew would cost more than much of what it
-- does.
local the_pool = {
  key = false, at = false, wall = 0, now = 0, run = false, epoch = false, base = false, began = false, seen = false, budget = 0,
  yields = 0, tries = 0, gone = nil, unswept = nil, outlook = nil, line = nil, vars = {}, others = {}, written = {},
  replicas = {}, moved = {}, moves = 0, dirty = {}, dirties = 0, tickets = {}, changed = {},
  -- The two queues: the prefix of their keys, and their fields of `:vars`.
  interactive = {
    key = false, counters = false, last = 'last', floor = 'floor', placed = 'placed', queued = 'queued', is_background = false,
  },
  background = {
    key = false, counters = false, last = 'background_last', floor = 'background_floor', placed = 'background_placed',
    queued = 'background_queued', is_background = true,
  },
}

-- Forgets what a call has read of a pool.
local function forget_reads(pool)
  -- Mostly these two are empty.
  if next(pool.others) then pool.others = {} end
  if next(pool.written) then pool.written = {} end
  pool.replicas, pool.moves, pool.dirties, pool.tickets, pool.changed = {}, 0, 0, {}, {}
end

-- Begins a call.
local function begin(prefix, wall)
  local pool = the_pool
  process = process or string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  local at = names[prefix] or names_of_keys(prefix)
  pool.key, pool.at, pool.wall, pool.now, pool.run = prefix, at, wall, wall, process
  pool.interactive.key, pool.interactive.counters = prefix, at.counters
  pool.background.key, pool.background.counters = at.background, at.background_counters
  pool.budget, pool.yields, pool.tries = MAX_REAPED, MAX_YIELDS, 0
  pool.gone, pool.unswept, pool.outlook, pool.line = nil, nil, nil, nil
  forget_reads(pool)
  return pool
end

-- The field of the figures. Those of another layout have another name.
local FIGURES_FIELD = 'figures' .. LAYOUT

-- Begins a new epoch of an empty pool. `mark` grows with every call and across epochs: it begins with the time in µs. An epoch is named
-- after its first mark.
local function begin_epoch(pool, mark)
  pool.now = pool.wall
  mark = math.max(pool.now * 1000, mark + 1)
  pool.epoch, pool.base, pool.began = string.format('%.0f', mark), mark, pool.run
  pool.seen = { mark = mark, epoch = pool.epoch, began = pool.run, base = mark, plain = 0 }
  seen_last[pool.key] = pool.seen
  forget_reads(pool)
  clear_figures(pool.vars, mark, pool.wall)
  redis.call(
    'HSET', pool.at.vars, 'layout', LAYOUT, 'epoch', pool.epoch, 'began', pool.run, 'run', pool.run, 'base', pool.epoch, FIGURES_FIELD,
    packed_figures(pool.vars)
  )
end

-- Makes all counts of tenants and keys invalid. Every pool that was rebuilt asks for this; only the first of this process has an effect.
-- The value contains the time, because the same release may come back to this process after another one has used it.
local function doubt_limits(pool)
  local mine = LAYOUT .. '-' .. pool.run .. '-'
  local said = redis.call('GET', 'lmaas:limits')
  if not said or string.sub(said, 1, #mine) ~= mine then redis.call('SET', 'lmaas:limits', mine .. string.format('%.0f', pool.wall)) end
end

-- Empties a pool whose memory cannot be trusted. The ledger takes each event once, so what is reported again is not charged twice.
local function rebuild(pool, mark)
  local stored = redis.pcall('HGETALL', pool.at.tickets)
  for i = 2, stored.err and 0 or #stored, 2 do
    -- A ticket of another release may have any content. Before layout 4 it was JSON.
    pcall(function() record_lost(pool, string.byte(stored[i]) == 123 and cjson.decode(stored[i]) or ticket_of(stored[i])) end) -- 123 is '{'
  end
  for _, key in ipairs(redis.call('KEYS', pool.key .. ':*')) do
    if string.sub(key, 1, #pool.key + 6) ~= pool.key .. ':usage' then redis.call('DEL', key) end
  end
  doubt_limits(pool)
  begin_epoch(pool, mark)
end

-- Returns whether processes of a newer release use this pool now. Those of this release are about to be replaced and must not change it.
local function is_of_newer(prefix, wall)
  local found = redis.call('HMGET', prefix .. ':vars', 'layout', 'reaped')
  return tonumber(found[1] or 0) > LAYOUT and math.abs(wall - tonumber(found[2] or 0)) < LEASE_MS
end

-- Returns the server's time in ms.
local function time_now()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Reads what is not in the figures of a pool that this process does not know as it is now. Returns nil if the pool begins anew instead, and
-- nil and true if a newer release uses it.
local function look_again(pool, stored)
  local found = redis.call('HMGET', pool.at.vars, 'layout', 'epoch', 'run', 'base', 'began', 'mark')
  if not stored or tonumber(found[1] or 0) ~= LAYOUT then
    if is_of_newer(pool.key, pool.wall) then return nil, true end
    if redis.call('EXISTS', pool.at.vars, pool.at.tickets, pool.at.replicas) == 0 then
      begin_epoch(pool, 0)
    else
      rebuild(pool, tonumber(found[6] or 0))
    end
    return nil
  end
  local seen = { mark = false, epoch = found[2], base = tonumber(found[4]), began = found[5], plain = 0 }
  if found[3] ~= process then
    -- A new process has begun with this memory. A client that has seen more in the process before knows that the memory is older.
    seen.base = pool.vars.mark
    redis.call('HSET', pool.at.vars, 'run', process, 'base', string.format('%.0f', seen.base))
  end
  seen_last[pool.key] = seen
  pool.vars.calm = 0 -- another library was used, which may have given other leases
  return seen
end

-- Reads a pool at the beginning of a call. For a pool that a newer release uses, it returns nil if `or_nil`, else it raises an error.
local function open(prefix, or_nil)
  local pool = begin(prefix, time_now())
  local wall, vars, stored = pool.wall, pool.vars, redis.call('HGET', pool.at.vars, FIGURES_FIELD)
  if stored then read_figures(vars, stored) end
  local seen = seen_last[prefix]
  if not stored or not seen or seen.mark ~= vars.mark then
    local is_newer = false
    seen, is_newer = look_again(pool, stored)
    if is_newer and or_nil then return nil end
    if is_newer then error('this pool is used by a newer release') end
    if not seen then return pool end
  end
  vars.mark = vars.mark + 1
  seen.mark, pool.seen, pool.epoch, pool.base, pool.began = vars.mark, seen, seen.epoch, seen.base, seen.began
  if wall < vars.reaped then vars.offset = vars.offset + vars.reaped - wall end
  pool.now = wall + vars.offset
  -- There is a call every second. If there was none for a while, this server was away, not all its clients: they get time to come back.
  if wall - vars.reaped > AWAY_MS then vars.spare = pool.now + LEASE_MS end
  vars.reaped = wall
  return pool
end

-- Returns the mark that a client keeps and sends with its next call to `open_as_seen`.
local function memory(pool)
  return string.format('%s %.0f', pool.run, pool.vars.mark)
end

-- Reads a pool, and rebuilds it if its client has seen a later state of it. `seen` is what `memory` returned last, '' before the first
-- call.
local function open_as_seen(prefix, seen)
  local pool = open(prefix)
  local run, mark = string.match(seen, '^(%w+) (%d+)$')
  mark = tonumber(mark)
  if mark and mark > (run == pool.run and pool.vars.mark or pool.base) then
    rebuild(pool, mark)
  elseif mark and run ~= pool.run and pool.began == pool.run and mark < tonumber(pool.epoch) then
    -- The memory was lost, and this process began a new one, so its counts of limits may be old. (An epoch that the process has only taken
    -- over is older than the loss.)
    doubt_limits(pool)
  end
  return pool
end

-- Returns whether neither interactive nor background tickets wait.
local function nothing_waits(pool)
  return pool.vars.queued == 0 and pool.vars.background_queued == 0
end

-- Writes the figures of a pool, and the copies for other releases.
local function write_figures(key, vars, seen)
  if math.abs(vars.reaped - seen.plain) < PLAIN_MS then
    redis.call('HSET', key, FIGURES_FIELD, packed_figures(vars))
  else
    seen.plain = vars.reaped
    redis.call('HSET', key, FIGURES_FIELD, packed_figures(vars), 'reaped', vars.reaped, 'mark', string.format('%.0f', vars.mark))
  end
end

-- Writes what a call has changed of tickets and `:vars`; `close` (fleet.lua) does it, after the replicas.
local function write_rest(pool)
  for id, ticket in pairs(pool.changed) do redis.call('HSET', pool.at.tickets, id, packed_ticket(ticket)) end
  for name, value in pairs(pool.written) do redis.call('HSET', pool.at.vars, name, value) end
  write_figures(pool.at.vars, pool.vars, pool.seen)
end

-- Returns whether a ticket still holds what it was given: its replica was not removed since, and if it waits there for its adapter, the
-- replica does not drain. Defined in fleet.lua.
local stands
-- Takes a ticket that does not stand from its replica. Defined in endings.lua.
local displace

-- Returns a ticket, or nil. A ticket is read once in a call and written by `close`, because it may change several times. A ticket whose
-- replica was lost looks the same whether a call has reached it in `:lost` or not.
local function get(pool, id)
  local known = pool.tickets[id]
  if known == nil then
    local stored = redis.call('HGET', pool.at.tickets, id)
    known = stored and ticket_of(stored) or false
    pool.tickets[id] = known
  end
  -- Also of a ticket that this call has read before it removed the replica.
  if known and known.replica and pool.vars.lost > 0 and not stands(pool, known) then displace(pool, known) end
  return known or nil
end

local function put(pool, ticket)
  pool.tickets[ticket.id], pool.changed[ticket.id] = ticket, ticket
end

local function drop(pool, ticket)
  pool.changed[ticket.id] = nil
  pool.tickets[ticket.id] = false
  redis.call('HDEL', pool.at.tickets, ticket.id)
end

-- Tells a ticket's gateway of its new state.
local function tell(ticket, event, fields)
  fields = fields or {}
  -- `attempts` distinguishes news of this delivery from late news of an earlier one.
  fields.id, fields.event, fields.attempts = ticket.id, event, ticket.attempts
  redis.call('PUBLISH', 'lmaas:gateway:' .. ticket.gateway, cjson.encode(fields))
end

-- Encodes and decodes the needs of a queued ticket, by which it finds a replica: sequences and adapter ('' for the base model). Tickets
-- with the same needs have the same text.
local function needs_of(ticket)
  return ticket.weight .. '|' .. ticket.adapter
end

local function weight_and_adapter(needs)
  local weight, adapter = string.match(needs, '^(%d+)|(.*)$')
  return tonumber(weight), adapter
end
