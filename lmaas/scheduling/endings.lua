-- How tickets end or lose their place: they are released, given back, taken from a replica that is lost, or given up with their gateway.

-- Ends a ticket: frees what it holds, and settles it to the tokens that it used (nil: none).
local function forget(pool, ticket, used)
  local before, bare = 0, false
  if ticket.state == TICKET.QUEUED then
    dequeue(pool, ticket)
  else
    if ticket.placed and ticket.state ~= TICKET.YIELDED then
      before, bare = charged(pool, ticket)
      charge(pool, ticket, (used and units(used) or 0) - before)
    end
    let_go(pool, ticket)
  end
  settle(pool, ticket, used)
  drop(pool, ticket)
  if not bare then redis.call('HDEL', pool.at.progress, ticket.id) end
  redis.call('ZREM', pool.at.expiry, ticket.id)
  if not ticket.background then set_var(pool, 'active', pool.now) end
end

-- Puts a ticket back at the front of the queue. Returns false if it has been delivered as often as it may be. What it was charged is
-- given back, since its client has received nothing.
local function requeue(pool, ticket, delivered)
  charge(pool, ticket, -charged(pool, ticket))
  redis.call('HDEL', pool.at.progress, ticket.id)
  let_go(pool, ticket)
  if delivered then
    ticket.attempts = ticket.attempts + 1
    if ticket.attempts >= MAX_ATTEMPTS then
      ticket.state, ticket.placed, ticket.granted = TICKET.FAILED, nil, nil
      put(pool, ticket)
      return false
    end
  end
  enqueue(pool, ticket, true)
  return true
end

-- Takes a ticket from a replica that was removed, or that drains before it has loaded the ticket's adapter. A ticket whose adapter was
-- loading waits again. The gateway of one that ran is told: its stream breaks, or the gateway cuts it.
displace = function(pool, ticket)
  if ticket.state == TICKET.LOADING then
    requeue(pool, ticket, false)
  else
    -- It holds nothing any more, even if a replica with this id comes back.
    ticket.state, ticket.revoked = TICKET.REVOKED, ticket.replica
    ticket.replica, ticket.held, ticket.life = nil, nil, nil
    put(pool, ticket)
    tell(ticket, TICKET.REVOKED)
  end
end

-- Takes back tickets that are listed as lost, those that came first first, as many as this call may.
local function take_back_lost(pool)
  while pool.budget > 0 and pool.vars.lost > 0 do
    local number = redis.call('LINDEX', pool.key .. ':lost', 0)
    local found = redis.call('ZPOPMIN', pool.key .. ':lost:' .. number, pool.budget)
    for i = 1, #found, 2 do get(pool, found[i]) end
    pool.budget = pool.budget - #found / 2
    if redis.call('EXISTS', pool.key .. ':lost:' .. number) == 0 then
      redis.call('LPOP', pool.key .. ':lost')
      set_var(pool, 'lost', pool.vars.lost - 1)
    end
  end
end

-- Removes a replica.
local function remove(pool, id)
  local replica = replica_of(pool, id)
  if not replica then return end
  remove_replica(pool, replica)
  take_back_lost(pool)
end

-- Ends tickets of gateways that are gone, charged at their last checkpoint, and removes replicas that are gone. Returns whether there
-- were any, since others may have a turn then.
local function reap(pool)
  local gone, found = sweep(pool), pool.vars.lost > 0
  take_back_lost(pool)
  if is_calm(pool) or pool.now < pool.vars.spare then return found end
  local expired = redis.call('ZRANGEBYSCORE', pool.at.expiry, '-inf', pool.now, 'LIMIT', 0, pool.budget)
  for _, id in ipairs(expired) do
    local ticket = get(pool, id)
    if ticket then
      local used = record_lost(pool, ticket)
      -- The attempt of durable work is wasted, and its tokens do not count for limits.
      forget(pool, ticket, not ticket.durable and used or nil)
    else
      redis.call('ZREM', pool.at.expiry, id)
    end
  end
  pool.budget = pool.budget - #expired
  table.sort(gone)
  for i = 1, math.min(#gone, MAX_GONE) do remove(pool, gone[i]) end
  note_calm(pool)
  return found or #expired > 0 or #gone > 0
end
