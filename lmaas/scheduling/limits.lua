-- Limits: what tenants and keys may use. A request reserves the most that it may use when it is accepted, and is settled to what it used
-- when it ends. A request that was refused, or never ran, has used nothing. All of this happens inside the calls that queue and release a
-- ticket, so it is exact with any number of gateways.
--
-- A scope (a tenant or a key) is stored as bytes: three that make all of it one MessagePack text, since a release before layout 4 decodes
-- it and finds that it is not its own; `memory`; the numbers of HEAD; and `window`. Most requests change only the numbers, which are
-- overwritten in place.
--   memory   the memory that it belongs to: the layout, and the value of `lmaas:limits` when it was created. After a pool's memory was
--            replaced, all scopes begin anew. A scope of another layout, whose release may run beside this one, is never read.
--   requests, minute_tokens  what was counted in the last minute
--   running  requests accepted and not yet ended
--   month    year * 100 + month (UTC), with the tokens and the cost (picodollars) of that month
--   seeded   whether it has the month's figures of the ledger (see SEEDED), and when a gateway was told to bring them (`asked`)
--   generation  grows when the month's figures begin anew: earlier reservations are not in them
--   turn_ms  the moving average of the time from their acceptance to their end
--   second   the latest second in which something was counted, with its requests (`newest`) and tokens (`newest_tokens`); 0 for none
--   oldest   the oldest second of the window; 0 for none
--   kept_at  the second in which it was last written as a whole, so that it is kept for FORGET_S from then on
--   window   each earlier second of the last minute in which something was counted, oldest first: second, requests, tokens
-- Background tickets count only in the month's figures.
-- No more than a minute's limit is accepted in any 60 seconds: a second counts until all of it is more than 60 seconds ago.

-- What other parts use of this one. Its other names are its own, since all parts together may have 200 names.
local take_seeds, reserve, settle
do

-- Whether a scope has the month's figures: they were not asked for; a gateway was told to fetch them from the ledger; they are here.
local SEEDED = { NO = 0, ASKED = 1, YES = 2 }
local WINDOW_S = 60
local ASK_AGAIN_MS = 15000 -- by then the ledger has responded, or the gateway that asked it is gone
local MAX_RETRY_MS = 60000 -- OpenAI's clients ignore longer waits
local FORGET_S = 86400 -- a scope that is not used is deleted; the ledger has what matters of it
local KEEP_S = 3600    -- how much earlier that may be

-- Returns year * 100 + month (UTC) (Howard Hinnant's civil_from_days).
local function month_of(now_ms)
  local z = math.floor(now_ms / 86400000) + 719468
  local era = math.floor(z / 146097)
  local day = z - era * 146097
  local year = math.floor((day - math.floor(day / 1460) + math.floor(day / 36524) - math.floor(day / 146096)) / 365)
  local shifted = math.floor((5 * (day - (365 * year + math.floor(year / 4) - math.floor(year / 100))) + 2) / 153)
  local month = shifted < 10 and shifted + 3 or shifted - 9
  return (year + era * 400 + (month <= 2 and 1 or 0)) * 100 + month
end

-- The last day of which the month was asked, and that month.
local last_day, last_month = nil, nil

local function month_now(pool)
  local day = math.floor(pool.wall / 86400000)
  if day ~= last_day then last_day, last_month = day, month_of(pool.wall) end
  return last_month
end

-- Whole numbers with their high bytes first, and the cost, which may be too large for that, in an order in which the lowest bytes of those
-- that change are among the characters of which Lua's hash is made (see `tail_of`).
local HEAD = '>lllllllllllldll'
local HEAD_BYTES = 120 -- fifteen of eight; `struct` is not available while the library is loaded
local ENTRY = '<ddd'
local ENTRY_BYTES = 24

-- The tables of the scopes that a call reads, by their place among its limits. They are used again by the next call.
local scopes_of_call = {}

-- Returns the earlier seconds of a scope. They are read only when they are needed.
local function window_of(scope)
  if not scope.window then scope.window = redis.call('GETRANGE', scope.key, #scope.memory + 3 + HEAD_BYTES, -1) end
  return scope.window
end

local function entries(scope)
  return #window_of(scope) / ENTRY_BYTES
end

-- Returns an entry's second, requests and tokens. The oldest is number 1.
local function entry(scope, number)
  return struct.unpack(ENTRY, window_of(scope), (number - 1) * ENTRY_BYTES + 1)
end

-- Sets the entries of a scope, from `first` to `last` of those that it has.
local function keep_entries(scope, first, last)
  scope.window, scope.is_whole = string.sub(scope.window, (first - 1) * ENTRY_BYTES + 1, last * ENTRY_BYTES), true
  scope.oldest = first <= last and struct.unpack(ENTRY, scope.window) or 0
end

-- Adds to an entry; negative numbers subtract.
local function add(scope, number, requests, tokens)
  local second, had_requests, had_tokens = entry(scope, number)
  local changed = struct.pack(ENTRY, second, had_requests + requests, had_tokens + tokens)
  scope.window = string.sub(scope.window, 1, (number - 1) * ENTRY_BYTES) .. changed .. string.sub(scope.window, number * ENTRY_BYTES + 1)
  scope.requests, scope.minute_tokens, scope.is_whole = scope.requests + requests, scope.minute_tokens + tokens, true
end

-- Adds to the newest second.
local function add_newest(scope, requests, tokens)
  scope.newest, scope.newest_tokens = scope.newest + requests, scope.newest_tokens + tokens
  scope.requests, scope.minute_tokens = scope.requests + requests, scope.minute_tokens + tokens
end

-- Drops what was counted more than a minute ago, and in the future, which is from before the clock was set back.
local function forget_seconds(scope, second)
  if scope.second > 0 and (scope.second > second or scope.second + WINDOW_S < second) then
    add_newest(scope, -scope.newest, -scope.newest_tokens)
    scope.second = 0
  elseif scope.oldest == 0 or scope.oldest + WINDOW_S >= second then
    return
  end
  local all = entries(scope)
  local first, last = 1, all
  while first <= last do
    local at, requests, tokens = entry(scope, first)
    if at + WINDOW_S >= second then break end
    first, scope.requests, scope.minute_tokens = first + 1, scope.requests - requests, scope.minute_tokens - tokens
  end
  while first <= last do
    local at, requests, tokens = entry(scope, last)
    if at <= second then break end
    last, scope.requests, scope.minute_tokens = last - 1, scope.requests - requests, scope.minute_tokens - tokens
  end
  if scope.second == 0 and first <= last then
    scope.second, scope.newest, scope.newest_tokens = entry(scope, last)
    last = last - 1
  end
  if first > 1 or last < all then keep_entries(scope, first, last) end
end

-- Returns a scope as it is now, from what is stored of its head, in the table `scope`.
local function read_scope(pool, scope, id, current)
  local key = 'lmaas:limits:' .. id
  local stored = redis.call('GETRANGE', key, 3, #current + 2 + HEAD_BYTES)
  scope.id, scope.key, scope.memory, scope.window, scope.is_whole = id, key, current, false, false
  if string.sub(stored, 1, #current) == current then
    scope.seeded, scope.generation, scope.minute_tokens, scope.asked, scope.month, scope.tokens, scope.oldest, scope.second,
      scope.requests, scope.kept_at, scope.turn_ms, scope.running, scope.cost, scope.newest_tokens, scope.newest
      = struct.unpack(HEAD, stored, #current + 1)
    forget_seconds(scope, math.floor(pool.wall / 1000))
  else
    scope.requests, scope.minute_tokens, scope.running, scope.month, scope.tokens, scope.cost = 0, 0, 0, month_now(pool), 0, 0
    scope.seeded, scope.generation, scope.asked, scope.turn_ms, scope.kept_at = SEEDED.NO, 0, 0, TURN_MS, 0
    scope.second, scope.newest, scope.newest_tokens, scope.oldest, scope.window, scope.is_whole = 0, 0, 0, 0, '', true
  end
  if scope.month ~= month_now(pool) then
    -- A new month begins with zero and needs no ledger.
    scope.month, scope.tokens, scope.cost = month_now(pool), 0, 0
  end
  return scope
end

-- Returns the memory to which scopes belong now.
local function memory_of_limits()
  return LAYOUT .. '/' .. (redis.call('GET', 'lmaas:limits') or '')
end

-- Returns a scope by its place among the limits of a call.
local function scope_of(pool, place, id, current)
  local scope = scopes_of_call[place]
  if not scope then
    scope = {}
    scopes_of_call[place] = scope
  end
  return read_scope(pool, scope, id, current)
end

local function save_scope(pool, scope)
  local second = math.floor(pool.wall / 1000)
  local is_whole = scope.is_whole or math.abs(second - scope.kept_at) >= KEEP_S
  if is_whole then scope.kept_at = second end
  local head = struct.pack(
    HEAD, scope.seeded, scope.generation, scope.minute_tokens, scope.asked, scope.month, scope.tokens, scope.oldest, scope.second,
    scope.requests, scope.kept_at, scope.turn_ms, scope.running, scope.cost, scope.newest_tokens, scope.newest
  )
  if not is_whole then
    redis.call('SETRANGE', scope.key, #scope.memory + 3, head)
    return
  end
  local window = window_of(scope)
  -- 218 and two bytes of length: a text in MessagePack.
  local start = struct.pack('>BH', 218, #scope.memory + HEAD_BYTES + #window)
  redis.call('SET', scope.key, start .. scope.memory .. head .. window, 'EX', FORGET_S)
end

local function cost_of(ticket, prompt, cached, completion)
  cached = math.min(cached, prompt)
  return (prompt - cached) * ticket.prompt_price + cached * ticket.cached_price + completion * ticket.completion_price
end

-- Returns how long (ms) until `excess` of LIMIT.REQUESTS or LIMIT.TOKENS are more than a minute ago.
local function until_freed(pool, scope, what, excess)
  local freed = 0
  for number = 1, entries(scope) do
    local second, requests, tokens = entry(scope, number)
    freed = freed + (what == LIMIT.REQUESTS and requests or tokens)
    if freed >= excess then return (second + WINDOW_S + 1) * 1000 - pool.wall end
  end
  freed = freed + (what == LIMIT.REQUESTS and scope.newest or scope.newest_tokens)
  if freed >= excess then return (scope.second + WINDOW_S + 1) * 1000 - pool.wall end
  return WINDOW_S * 1000
end

-- Returns how long (ms) until everything is more than a minute ago.
local function until_reset(pool, scope, what)
  if (what == LIMIT.REQUESTS and scope.newest or scope.newest_tokens) > 0 then return (scope.second + WINDOW_S + 1) * 1000 - pool.wall end
  for number = entries(scope), 1, -1 do
    local second, requests, tokens = entry(scope, number)
    if (what == LIMIT.REQUESTS and requests or tokens) > 0 then return (second + WINDOW_S + 1) * 1000 - pool.wall end
  end
  return 0
end

local function count(pool, scope, requests, tokens)
  local second = math.floor(pool.wall / 1000)
  if scope.second ~= second then
    if scope.second > 0 then
      scope.window = window_of(scope) .. struct.pack(ENTRY, scope.second, scope.newest, scope.newest_tokens)
      scope.is_whole = true
      if scope.oldest == 0 then scope.oldest = scope.second end
    end
    scope.second, scope.newest, scope.newest_tokens = second, 0, 0
  end
  add_newest(scope, requests, tokens)
end

-- Returns how long (ms) until one of the requests that run or wait probably ends.
local function until_one_ends(scope)
  return math.max(1, math.min(MAX_RETRY_MS, math.floor(scope.turn_ms / math.max(1, scope.running))))
end

-- Returns a limit that a ticket would exceed, if it is to be reported rather than `worst`: the first with which waiting does not help
-- (without `retry_ms`), else the one that takes longest.
local function worse(worst, limit, name, allowed, used, asked, retry_ms)
  if worst and not (worst.retry_ms and (not retry_ms or retry_ms > worst.retry_ms)) then return worst end
  return { limit = name, allowed = allowed, used = used, asked = asked, retry_ms = retry_ms, scope = limit.scope }
end

-- Returns the limit of this scope that is reported, or `worst`.
local function exceeded(pool, worst, scope, limit, tokens, cost)
  local requests_used, tokens_used = scope.requests, scope.minute_tokens
  if limit.max_concurrent and scope.running + 1 > limit.max_concurrent then
    worst = worse(worst, limit, LIMIT.CONCURRENCY, limit.max_concurrent, nil, nil, until_one_ends(scope))
  end
  if limit.requests_per_minute and requests_used + 1 > limit.requests_per_minute then
    local retry_ms = until_freed(pool, scope, LIMIT.REQUESTS, requests_used + 1 - limit.requests_per_minute)
    worst = worse(worst, limit, LIMIT.REQUESTS, limit.requests_per_minute, requests_used, 1, retry_ms)
  end
  if limit.tokens_per_minute and tokens > limit.tokens_per_minute then
    worst = worse(worst, limit, LIMIT.REQUEST_TOKENS, limit.tokens_per_minute, nil, tokens, nil)
  elseif limit.tokens_per_minute and tokens_used + tokens > limit.tokens_per_minute then
    local retry_ms = until_freed(pool, scope, LIMIT.TOKENS, tokens_used + tokens - limit.tokens_per_minute)
    worst = worse(worst, limit, LIMIT.TOKENS, limit.tokens_per_minute, tokens_used, tokens, retry_ms)
  end
  if limit.tokens_per_month and scope.tokens + tokens > limit.tokens_per_month then
    worst = worse(worst, limit, LIMIT.MONTH_TOKENS, limit.tokens_per_month, scope.tokens, tokens, nil)
  end
  if limit.budget_per_month and scope.cost + cost > limit.budget_per_month * 1000000 then
    worst = worse(worst, limit, LIMIT.BUDGET, limit.budget_per_month, nil, nil, nil)
  end
  return worst
end

-- Returns the limit that is reported of those that a ticket would exceed; nil if there is none.
local function refusal(pool, scopes, limits, tokens, cost)
  local worst = nil
  for i = 1, #limits do worst = exceeded(pool, worst, scopes[i], limits[i], tokens, cost) end
  if worst then worst.retry_ms = worst.retry_ms or 0 end
  return worst
end

-- Sees what is left of a minute's limit in a scope, in `left`.
local function see_left(pool, left, scope, what, allowed, used)
  local remaining = math.max(0, allowed - used)
  if not left[what] or remaining < left[what][2] then left[what] = { allowed, remaining, until_reset(pool, scope, what) } end
end

-- Returns what is left of a minute's limits, for each of the scope that has the least left.
local function tightest(pool, scopes, limits)
  local left = {}
  for i = 1, #limits do
    local scope, limit = scopes[i], limits[i]
    if limit.requests_per_minute then see_left(pool, left, scope, LIMIT.REQUESTS, limit.requests_per_minute, scope.requests) end
    if limit.tokens_per_minute then see_left(pool, left, scope, LIMIT.TOKENS, limit.tokens_per_minute, scope.minute_tokens) end
  end
  return left
end

-- Adds the ledger's figures of the month: {scope → [month, tokens, cost]}.
take_seeds = function(pool, seeds)
  local current = memory_of_limits()
  for id, seed in pairs(seeds) do
    local scope = scope_of(pool, 1, id, current)
    if scope.seeded == SEEDED.ASKED and seed[1] == scope.month then
      scope.tokens, scope.cost, scope.seeded = scope.tokens + seed[2], scope.cost + seed[3], SEEDED.YES
      save_scope(pool, scope)
    end
  end
end

-- What a ticket has reserved, as it is kept with the ticket: the memory of its scopes, their number, the second, the month, tokens and
-- cost; then for each scope its generation and id.
local RESERVATION = '>Bc0Hlldl'
local RESERVED_SCOPE = '>lHc0'

-- Reserves what a ticket may use. Returns nil and what is left of the limits, or the refusal. Everything is checked before anything is
-- reserved. A `forced` ticket was accepted before the server lost its memory, and is not refused.
reserve = function(pool, ticket, limits, forced)
  ticket.reserved = ''
  if #limits == 0 then return nil, nil end
  local tokens = ticket.prompt_tokens + ticket.completion_tokens
  local cost = cost_of(ticket, ticket.prompt_tokens, 0, ticket.completion_tokens)
  local current, scopes, unseeded = memory_of_limits(), {}, nil
  for i = 1, #limits do
    local limit = limits[i]
    local scope = scope_of(pool, i, limit.id, current)
    scopes[i] = scope
    if (limit.tokens_per_month or limit.budget_per_month) and scope.seeded ~= SEEDED.YES then
      unseeded = unseeded or {}
      unseeded[#unseeded + 1] = limit.id
      if not forced and (scope.seeded == SEEDED.NO or math.abs(pool.wall - scope.asked) > ASK_AGAIN_MS) then
        -- Requests that end from now on are counted here; the ledger has those that have ended.
        scope.seeded, scope.asked, scope.generation, scope.tokens, scope.cost = SEEDED.ASKED, pool.wall, scope.generation + 1, 0, 0
        save_scope(pool, scope)
      end
    end
  end
  if not forced then
    if unseeded then return { state = NO_TICKET.UNSEEDED, scopes = unseeded, month = scopes[1].month } end
    local refused = refusal(pool, scopes, limits, tokens, cost)
    if refused then
      refused.state, refused.left = NO_TICKET.LIMITED, tightest(pool, scopes, limits)
      return refused
    end
  end
  local reserved = struct.pack(
    RESERVATION, #current, current, #scopes, math.floor(pool.wall / 1000), scopes[1].month, cost, tokens
  )
  for i = 1, #scopes do
    local scope = scopes[i]
    if not ticket.background then
      count(pool, scope, 1, tokens)
      scope.running = scope.running + 1
    end
    scope.tokens, scope.cost = scope.tokens + tokens, scope.cost + cost
    reserved = reserved .. struct.pack(RESERVED_SCOPE, scope.generation, #scope.id, scope.id)
    save_scope(pool, scope)
  end
  ticket.reserved = reserved
  return nil, tightest(pool, scopes, limits)
end

-- Corrects what a scope counted in `second` by `difference` tokens, and gives the request back if it was not `spent`. Returns whether
-- anything was counted then.
local function correct(scope, second, spent, difference)
  if scope.second == second then
    add_newest(scope, not spent and scope.newest > 0 and -1 or 0, math.max(-scope.newest_tokens, difference))
    return true
  end
  for number = scope.oldest > 0 and scope.oldest <= second and entries(scope) or 0, 1, -1 do
    local at, requests, counted = entry(scope, number)
    if at == second then
      add(scope, number, not spent and requests > 0 and -1 or 0, math.max(-counted, difference))
      return true
    end
    if at < second then break end
  end
  return false
end

-- Settles a reservation to what was used. A ticket that used nothing gives its request back too.
settle = function(pool, ticket, used)
  if ticket.reserved == '' then return end
  local memory, count_of_scopes, second, month, reserved_cost, reserved_tokens, at = struct.unpack(RESERVATION, ticket.reserved)
  local tokens, cost = 0, 0
  if used then
    tokens = used.prompt + used.completion
    cost = cost_of(ticket, used.prompt, used.cached, used.completion)
  end
  local current = memory_of_limits()
  -- `here`: it was reserved in this memory, and not in one that is gone.
  local here = memory == current
  for i = 1, count_of_scopes do
    local generation, id, next_at = struct.unpack(RESERVED_SCOPE, ticket.reserved, at)
    at = next_at
    local scope = scope_of(pool, i, id, current)
    if not ticket.background then
      local found = here and correct(scope, second, tokens > 0, tokens - reserved_tokens)
      -- It ran for more than a minute: what it used beyond its reservation counts now.
      if not found and tokens > reserved_tokens then count(pool, scope, 0, tokens - reserved_tokens) end
      if here then scope.running = math.max(0, scope.running - 1) end
      if used then scope.turn_ms = average(scope.turn_ms, math.max(0, pool.now - ticket.submitted)) end
    end
    if scope.month == month then
      local held = here and scope.generation == generation and 1 or 0
      scope.tokens = math.max(0, scope.tokens + tokens - held * reserved_tokens)
      scope.cost = math.max(0, scope.cost + cost - held * reserved_cost)
    end
    save_scope(pool, scope)
  end
end

end
