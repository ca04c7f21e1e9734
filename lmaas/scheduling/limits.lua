-- Limits: what tenants and keys may use. A request reserves the most that it may use when it is accepted, and is settled to what it used
-- when it ends. A request that was refused, or never ran, has used nothing. All of this happens inside the calls that queue and release a
-- ticket, so it is exact with any number of gateways.
--
-- A scope (a tenant or a key) is stored as some MessagePack values, one after the other, which costs less than a map of them: memory,
-- window, requests, minute_tokens, running, month, tokens, cost, seeded, generation, asked, turn_ms. `memory` is the first, because the
-- release before this one reads the first value and finds that it is not its own:
--   window   each second of the last minute in which something was counted, oldest
-- first: second, requests, tokens. It is a string of bytes,
--            since unpacking a table of them with each request would cost more than everything else
--   requests, minute_tokens  their sums
--   running  requests accepted and not yet ended
--   turn_ms  the moving average of the time from their acceptance to their end
--   month    year * 100 + month (UTC), with the tokens and the cost (picodollars) of that month
--   seeded   whether it has the month's figures of the ledger (see SEEDED), and when a gateway was told to bring them (`asked`)
--   memory   the memory that it belongs to: the layout, and the value of `lmaas:limits` when it was created. After a pool's memory was
--            replaced, all scopes begin anew. A scope of another layout, whose release may run beside this one, is never read.
--   generation  grows when the month's figures begin anew: earlier reservations are not in them
-- Background tickets count only in the month's figures.
-- No more than a minute's limit is accepted in any 60 seconds: a second counts until all of it is more than 60 seconds ago.

-- Whether a scope has the month's figures: they were not asked for; a gateway was told to fetch them from the ledger; they are here.
local SEEDED = { NO = 0, ASKED = 1, YES = 2 }
local WINDOW_S = 60
local ASK_AGAIN_MS = 15000 -- by then the ledger has responded, or the gateway that asked it is gone
local MAX_RETRY_MS = 60000 -- OpenAI's clients ignore longer waits
local FORGET_S = 86400 -- a scope that is not used is deleted; the ledger has what matters of it

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

local function month_now(pool)
  pool.month = pool.month or month_of(pool.wall)
  return pool.month
end

local ENTRY = '<ddd'
local ENTRY_BYTES = 24 -- three doubles; `struct` is not available while the library is loaded

local function entries(scope)
  return #scope.window / ENTRY_BYTES
end

-- Returns an entry's second, requests and tokens. The oldest is number 1.
local function entry(scope, number)
  return struct.unpack(ENTRY, scope.window, (number - 1) * ENTRY_BYTES + 1)
end

-- Adds to an entry; negative numbers subtract.
local function add(scope, number, requests, tokens)
  local second, had_requests, had_tokens = entry(scope, number)
  local changed = struct.pack(ENTRY, second, had_requests + requests, had_tokens + tokens)
  scope.window = string.sub(scope.window, 1, (number - 1) * ENTRY_BYTES) .. changed .. string.sub(scope.window, number * ENTRY_BYTES + 1)
  scope.requests, scope.minute_tokens = scope.requests + requests, scope.minute_tokens + tokens
end

-- Drops entries that are more than a minute old, and those in the future, which are from before the clock was set back.
local function forget_seconds(scope, second)
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
  if first > 1 or last < all then scope.window = string.sub(scope.window, (first - 1) * ENTRY_BYTES + 1, last * ENTRY_BYTES) end
end

-- Returns a scope as it is now, from what is stored of it.
local function scope_of(pool, id, stored, current)
  local memory, window, requests, minute_tokens, running, month, tokens, cost, seeded, generation, asked, turn_ms
  if stored then
    memory, window, requests, minute_tokens, running, month, tokens, cost, seeded, generation, asked, turn_ms = cmsgpack.unpack(stored)
  end
  if memory ~= current then
    window, requests, minute_tokens, running, month, tokens, cost = '', 0, 0, 0, month_now(pool), 0, 0
    seeded, generation, asked, turn_ms = SEEDED.NO, 0, false, false
  end
  local scope = {
    id = id, memory = current, window = window, requests = requests, minute_tokens = minute_tokens, running = running, month = month,
    tokens = tokens, cost = cost, seeded = seeded, generation = generation, asked = asked, turn_ms = turn_ms,
  }
  forget_seconds(scope, math.floor(pool.wall / 1000))
  if month ~= month_now(pool) then
    -- A new month begins with zero and needs no ledger.
    scope.month, scope.tokens, scope.cost = month_now(pool), 0, 0
  end
  return scope
end

-- Reads the scopes of some limits.
local function load_scopes(pool, limits)
  local keys, scopes = { 'lmaas:limits' }, {}
  for i, limit in ipairs(limits) do keys[i + 1] = 'lmaas:limits:' .. limit.id end
  local found = redis.call('MGET', unpack(keys))
  local current = LAYOUT .. '/' .. (found[1] or '')
  for i, limit in ipairs(limits) do scopes[i] = scope_of(pool, limit.id, found[i + 1], current) end
  return scopes
end

local function save_scope(scope)
  local stored = cmsgpack.pack(
    scope.memory, scope.window, scope.requests, scope.minute_tokens, scope.running, scope.month, scope.tokens, scope.cost, scope.seeded,
    scope.generation, scope.asked, scope.turn_ms
  )
  redis.call('SET', 'lmaas:limits:' .. scope.id, stored, 'EX', FORGET_S)
end

local function cost_of(prices, prompt, cached, completion)
  cached = math.min(cached, prompt)
  return (prompt - cached) * prices[1] + cached * prices[2] + completion * prices[3]
end

-- Returns how long (ms) until `excess` of LIMIT.REQUESTS or LIMIT.TOKENS are more than a minute ago.
local function until_freed(pool, scope, what, excess)
  local freed = 0
  for number = 1, entries(scope) do
    local second, requests, tokens = entry(scope, number)
    freed = freed + (what == LIMIT.REQUESTS and requests or tokens)
    if freed >= excess then return (second + WINDOW_S + 1) * 1000 - pool.wall end
  end
  return WINDOW_S * 1000
end

-- Returns how long (ms) until everything is more than a minute ago.
local function until_reset(pool, scope, what)
  for number = entries(scope), 1, -1 do
    local second, requests, tokens = entry(scope, number)
    if (what == LIMIT.REQUESTS and requests or tokens) > 0 then return (second + WINDOW_S + 1) * 1000 - pool.wall end
  end
  return 0
end

local function count(pool, scope, requests, tokens)
  local second, last = math.floor(pool.wall / 1000), entries(scope)
  if last == 0 or entry(scope, last) ~= second then
    scope.window, last = scope.window .. struct.pack(ENTRY, second, 0, 0), last + 1
  end
  add(scope, last, requests, tokens)
end

-- Returns how long (ms) until one of the requests that run or wait probably ends.
local function until_one_ends(scope)
  return math.max(1, math.min(MAX_RETRY_MS, math.floor((scope.turn_ms or TURN_MS) / math.max(1, scope.running))))
end

-- Returns each limit of this scope that the ticket would exceed. Without `retry_ms`, waiting does not help.
local function refusals(pool, scope, limit, tokens, cost)
  local requests_used, tokens_used, found = scope.requests, scope.minute_tokens, {}
  local function refuse(name, allowed, used, asked, retry_ms)
    found[#found + 1] = { limit = name, allowed = allowed, used = used, asked = asked, retry_ms = retry_ms, scope = limit.scope }
  end
  if limit.max_concurrent and scope.running + 1 > limit.max_concurrent then
    refuse(LIMIT.CONCURRENCY, limit.max_concurrent, nil, nil, until_one_ends(scope))
  end
  if limit.requests_per_minute and requests_used + 1 > limit.requests_per_minute then
    local retry_ms = until_freed(pool, scope, LIMIT.REQUESTS, requests_used + 1 - limit.requests_per_minute)
    refuse(LIMIT.REQUESTS, limit.requests_per_minute, requests_used, 1, retry_ms)
  end
  if limit.tokens_per_minute and tokens > limit.tokens_per_minute then
    refuse(LIMIT.REQUEST_TOKENS, limit.tokens_per_minute, nil, tokens, nil)
  elseif limit.tokens_per_minute and tokens_used + tokens > limit.tokens_per_minute then
    local retry_ms = until_freed(pool, scope, LIMIT.TOKENS, tokens_used + tokens - limit.tokens_per_minute)
    refuse(LIMIT.TOKENS, limit.tokens_per_minute, tokens_used, tokens, retry_ms)
  end
  if limit.tokens_per_month and scope.tokens + tokens > limit.tokens_per_month then
    refuse(LIMIT.MONTH_TOKENS, limit.tokens_per_month, scope.tokens, tokens, nil)
  end
  if limit.budget_per_month and scope.cost + cost > limit.budget_per_month * 1000000 then
    refuse(LIMIT.BUDGET, limit.budget_per_month, nil, nil, nil)
  end
  return found
end

-- Returns the limit that is reported: the first with which waiting does not help, else the one that takes longest; nil if there is none.
local function refusal(pool, scopes, limits, tokens, cost)
  local worst = nil
  for i, limit in ipairs(limits) do
    for _, each in ipairs(refusals(pool, scopes[i], limit, tokens, cost)) do
      if not worst or (worst.retry_ms and (not each.retry_ms or each.retry_ms > worst.retry_ms)) then worst = each end
    end
  end
  if worst then worst.retry_ms = worst.retry_ms or 0 end
  return worst
end

-- Returns what is left of a minute's limits, for each of the scope that has the least left.
local function tightest(pool, scopes, limits)
  local left = {}
  local function see(scope, what, allowed, used)
    local remaining = math.max(0, allowed - used)
    if not left[what] or remaining < left[what][2] then left[what] = { allowed, remaining, until_reset(pool, scope, what) } end
  end
  for i, limit in ipairs(limits) do
    if limit.requests_per_minute then see(scopes[i], LIMIT.REQUESTS, limit.requests_per_minute, scopes[i].requests) end
    if limit.tokens_per_minute then see(scopes[i], LIMIT.TOKENS, limit.tokens_per_minute, scopes[i].minute_tokens) end
  end
  return left
end

-- Adds the ledger's figures of the month: {scope → [month, tokens, cost]}.
local function take_seeds(pool, seeds)
  for id, seed in pairs(seeds) do
    local scope = load_scopes(pool, { { id = id } })[1]
    if scope.seeded == SEEDED.ASKED and seed[1] == scope.month then
      scope.tokens, scope.cost, scope.seeded = scope.tokens + seed[2], scope.cost + seed[3], SEEDED.YES
      save_scope(scope)
    end
  end
end

-- Reserves what a ticket may use. Returns nil and what is left of the limits, or the refusal. Everything is checked before anything is
-- reserved. A `forced` ticket was accepted before the server lost its memory, and is not refused.
local function reserve(pool, ticket, forced)
  if #ticket.limits == 0 then return nil, nil end
  local tokens = ticket.prompt_tokens + ticket.completion_tokens
  local cost = cost_of(ticket.prices, ticket.prompt_tokens, 0, ticket.completion_tokens)
  local scopes, unseeded = load_scopes(pool, ticket.limits), {}
  for i, limit in ipairs(ticket.limits) do
    local scope = scopes[i]
    if (limit.tokens_per_month or limit.budget_per_month) and scope.seeded ~= SEEDED.YES then
      unseeded[#unseeded + 1] = limit.id
      if not forced and (scope.seeded == SEEDED.NO or math.abs(pool.wall - scope.asked) > ASK_AGAIN_MS) then
        -- Requests that end from now on are counted here; the ledger has those that have ended.
        scope.seeded, scope.asked, scope.generation, scope.tokens, scope.cost = SEEDED.ASKED, pool.wall, scope.generation + 1, 0, 0
        save_scope(scope)
      end
    end
  end
  if not forced then
    if #unseeded > 0 then return { state = NO_TICKET.UNSEEDED, scopes = unseeded, month = scopes[1].month } end
    local refused = refusal(pool, scopes, ticket.limits, tokens, cost)
    if refused then
      refused.state, refused.left = NO_TICKET.LIMITED, tightest(pool, scopes, ticket.limits)
      return refused
    end
  end
  local second, generations, memories = math.floor(pool.wall / 1000), {}, {}
  for i, scope in ipairs(scopes) do
    if not ticket.background then
      count(pool, scope, 1, tokens)
      scope.running = scope.running + 1
    end
    scope.tokens, scope.cost = scope.tokens + tokens, scope.cost + cost
    generations[i], memories[i] = scope.generation, scope.memory
    save_scope(scope)
  end
  ticket.reserved = { second = second, month = scopes[1].month, generations = generations, memories = memories, tokens = tokens, cost = cost }
  return nil, tightest(pool, scopes, ticket.limits)
end

-- Settles a reservation to what was used. A ticket that used nothing gives its request back too.
local function settle(pool, ticket, used)
  local reserved = ticket.reserved
  if not reserved then return end
  local tokens, cost = 0, 0
  if used then
    tokens = used.prompt + used.completion
    cost = cost_of(ticket.prices, used.prompt, used.cached, used.completion)
  end
  for i, scope in ipairs(load_scopes(pool, ticket.limits)) do
    -- `here`: it was reserved in this memory, and not in one that is gone.
    local here, found = scope.memory == reserved.memories[i], ticket.background
    for number = here and not ticket.background and entries(scope) or 0, 1, -1 do
      local second, requests, counted = entry(scope, number)
      if second == reserved.second then
        found = true
        add(scope, number, tokens == 0 and requests > 0 and -1 or 0, math.max(-counted, tokens - reserved.tokens))
      end
      if second <= reserved.second then break end
    end
    -- It ran for more than a minute: what it used beyond its reservation counts now.
    if not found and tokens > reserved.tokens then count(pool, scope, 0, tokens - reserved.tokens) end
    if here and not ticket.background then scope.running = math.max(0, scope.running - 1) end
    if used and not ticket.background then
      local turn_ms = scope.turn_ms or TURN_MS
      scope.turn_ms = math.floor(turn_ms + (math.max(0, pool.now - ticket.submitted) - turn_ms) / 8)
    end
    if scope.month == reserved.month then
      local held = here and scope.generation == reserved.generations[i] and 1 or 0
      scope.tokens = math.max(0, scope.tokens + tokens - held * reserved.tokens)
      scope.cost = math.max(0, scope.cost + cost - held * reserved.cost)
    end
    save_scope(scope)
  end
end
