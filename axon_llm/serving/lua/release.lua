-- Give a job up unfinished, so that the next claim is no take-over.
-- KEYS: job · ARGV: fence. Returns 1 if it was the caller's.
local job = redis.call('HMGET', KEYS[1], 'state', 'fence')
if job[1] == 'running' and job[2] == ARGV[1] then
  redis.call('HSET', KEYS[1], 'state', 'released', 'renewed', int(now_ms()))
  return 1
end
return 0
