/** What went wrong, in words for the person in front of the page: what it is, what to do, whether to try again. */
export class Failure extends Error {
  constructor(title, advice, again = false) {
    super(title);
    Object.assign(this, { advice, again });
  }
}
