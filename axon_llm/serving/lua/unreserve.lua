-- Free an idempotency key if it is bound to this job.
-- KEYS: idempotency key · ARGV: job id. Returns 1 if it was.
local bound = redis.call('GET', KEYS[1])
if bound and string.sub(bound, 1, #ARGV[1] + 1) == ARGV[1] .. ' ' then
  return redis.call('DEL', KEYS[1])
end
return 0
