"""Text that models write: engines that sample it, actors that write it into rows; no scores and no losses."""
