-- What is kept beside the events, written in the same transactions.

CREATE TABLE es.checkpoints (
    name text COLLATE "C" NOT NULL,
    position bigint NOT NULL,
    CONSTRAINT es_checkpoints_name PRIMARY KEY (name)
) WITH (fillfactor = 50); -- updated in place, again and again

-- Sets a checkpoint, where `expected` is not null only from there (0: it was never saved).
-- `actual` is where it is if it was not set.
CREATE FUNCTION es.save_checkpoint(
    checkpoint text, target bigint, expected bigint, OUT saved boolean, OUT actual bigint
) LANGUAGE plpgsql AS $$
BEGIN
    IF expected > 0 THEN
        UPDATE es.checkpoints c SET position = target
            WHERE c.name = checkpoint AND c.position = expected;
    ELSE
        INSERT INTO es.checkpoints AS c (name, position) VALUES (checkpoint, target)
            ON CONFLICT (name) DO UPDATE SET position = target
            WHERE expected IS NULL OR c.position = 0;
    END IF;
    saved := FOUND;
    IF NOT saved THEN
        actual := coalesce((SELECT c.position FROM es.checkpoints c WHERE c.name = checkpoint), 0);
    END IF;
END
$$;

CREATE TABLE es.outbox (
    position bigint GENERATED ALWAYS AS IDENTITY,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    message_id uuid NOT NULL,
    topic text NOT NULL,
    key text NOT NULL,
    metadata text,
    payload bytea NOT NULL,
    CONSTRAINT es_outbox_position PRIMARY KEY (position),
    CONSTRAINT es_outbox_message_id UNIQUE (message_id)
);
