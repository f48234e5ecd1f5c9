-- Delete a session's history unless a turn is running.
-- KEYS: history, turn · ARGV: prefix of job keys. Returns 'running' or the number of keys deleted.
local other = redis.call('GET', KEYS[2])
if other then
  local state = redis.call('HGET', ARGV[1] .. other, 'state')
  if state and state ~= 'done' then
    return 'running'
  end
end
redis.call('DEL', KEYS[2])
return redis.call('DEL', KEYS[1])
