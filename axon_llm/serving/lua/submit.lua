-- Accept a job. One running turn per session; the session must be as long as the submitter saw it.
-- KEYS: job, log, history, turn · ARGV: job id, body, model, trace, created, deadline, expire, turn number or '', prefix of job keys,
--   what tells this call from others
-- Returns: 'new' | 'exists' | 'running' | 'stale'
if redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.call('HGET', KEYS[1], 'call') == ARGV[10] and 'new' or 'exists'
end
if ARGV[8] ~= '' then
  local other = redis.call('GET', KEYS[4])
  if other then
    local state = redis.call('HGET', ARGV[9] .. other, 'state')
    if state and state ~= 'done' then
      return 'running'
    end
  end
  if redis.call('LLEN', KEYS[3]) ~= tonumber(ARGV[8]) then
    return 'stale'
  end
  redis.call('SET', KEYS[4], ARGV[1], 'PXAT', ARGV[7])
end
create(KEYS[1], KEYS[2], ARGV[2], ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
redis.call('HSET', KEYS[1], 'call', ARGV[10])
return 'new'
